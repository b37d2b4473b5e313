"""A stage between its neighbours: what is skipped on advice, what it passes on, and how the last one draws."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import pytest

from pipeinfer.core.addresses import FIRST_STAGE, ORCHESTRATOR
from pipeinfer.core.edges import Edges
from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import (
    NO_SLOT,
    Body,
    Cancel,
    Cancelled,
    Credit,
    DraftOrder,
    Message,
    Result,
    ResultRow,
    Row,
    Run,
    Settings,
    SlotOp,
    SlotOpKind,
    TopToken,
    Wants,
    fault_layer,
    fault_token,
)
from pipeinfer.core.ports import GREEDY, Abandon, Command, Compute, Computed, Received, Sampling, Send
from stages.stage.machine import Stage

BodyT = TypeVar("BodyT")
STAGES = 3
FIRST, MIDDLE, LAST = FIRST_STAGE, FIRST_STAGE + 1, FIRST_STAGE + 2
TREE = (Row(10, 2, NO_SLOT, 2, 1), Row(11, 3, 2, 3, 1), Row(12, 4, 2, 3, 1), Row(13, 5, 3, 4, 1))
"""A guess, two after it, and one after the first of those. The prompt is in slots 0 and 1."""


class Neighbours:
    """One stage of three, and all that others tell it. The prompt of sequence 1 is through, as run 1."""

    def __init__(self, address: int = MIDDLE, **knobs: Any) -> None:
        self.stage = Stage(address, STAGES, capacity=16, window=8, **knobs)
        self._edges: dict[int, Edges] = {}
        self.run(1, *at(1, Row(1, 0, NO_SLOT, 0), Row(2, 1, NO_SLOT, 1)), is_canonical=True, wants=Wants.LAST)
        self.computed(1)

    def tell(self, body: Body, source: int | None = None) -> list[Command]:
        """By default the stage before, or the orchestrator, says it."""
        source = self.stage.address - 1 if source is None else source
        message = self._edges.setdefault(source, Edges(source)).message(self.stage.address, body)
        return self.stage.handle(Received(message), 0.0)

    def run(self, number: int, *rows: Row, **fields: Any) -> list[Command]:
        return self.tell(Run(number, rows=rows, **fields))

    def cancel(self, *rows: tuple[int, int], relay: bool = False) -> list[Command]:
        """Advice about (run, slot) or (run, NO_SLOT)."""
        advice = Cancel(relay, tuple(Cancelled(run, slot, 1) for run, slot in rows))
        return self.stage.handle(Received(Message(ORCHESTRATOR, self.stage.address, advice)), 0.0)

    def computed(self, run: int, rows: int = 2, seconds: float = 0.0) -> list[Command]:
        is_last = self.stage.address == LAST
        choices = [[(90 + row, -0.5)] for row in range(rows)] if is_last else None
        if is_last and run == 1:
            choices = choices[:1] if choices else None
        return self.stage.handle(Computed(run, None if is_last else np.zeros(rows), choices, seconds), 0.0)


def at(sequence: int, *rows: Row) -> tuple[Row, ...]:
    return tuple(row._replace(sequence=sequence) for row in rows)


def compute_of(commands: list[Command]) -> Compute:
    (found,) = [command for command in commands if isinstance(command, Compute)]
    return found


def sent(commands: list[Command], kind: type[BodyT]) -> list[BodyT]:
    """The bodies of one kind that leave."""
    found = [command.message.body for command in commands if isinstance(command, Send)]
    return [body for body in found if isinstance(body, kind)]


def sends(commands: list[Command]) -> list[Send]:
    return [command for command in commands if isinstance(command, Send)]


def slots(compute: Compute) -> list[int]:
    return [int(slot) for slot in compute.batch.slots]


# Single rows are cancelled.


def test_a_dead_row_leaves_its_run_and_takes_its_descendants_along() -> None:
    around = Neighbours()
    assert around.cancel((2, 3)) == []
    command = compute_of(around.run(2, *TREE))
    assert slots(command) == [2, 4]
    assert command.keep == (0, 2), "these activations of the stage before stay"
    (passed_on,) = sent(around.computed(2), Run)
    assert passed_on.rows == (TREE[0], TREE[2])


def test_the_cancel_of_a_row_reaches_a_run_that_waits() -> None:
    around = Neighbours()
    around.run(2, *TREE)
    around.run(3, Row(14, 6, 5, 5, 1), Row(15, 7, 4, 4, 1))
    around.cancel((3, 6))
    assert slots(compute_of(around.computed(2, rows=4))) == [7]


def test_a_row_that_is_being_computed_is_computed_to_the_end() -> None:
    around = Neighbours()
    around.run(2, *TREE)
    assert around.cancel((2, 3)) == []
    (passed_on,) = sent(around.computed(2, rows=4), Run)
    assert passed_on.rows == TREE


def test_a_row_of_another_run_in_the_same_slot_is_none_of_its_business() -> None:
    around = Neighbours()
    around.cancel((2, 3))
    around.run(2, *TREE)
    around.computed(2)
    release = SlotOp(SlotOpKind.RELEASE, 3, 1, 0, 1), SlotOp(SlotOpKind.RELEASE, 5, 1, 0, 1)
    assert slots(compute_of(around.run(3, Row(16, 3, 2, 3, 1), ops=release))) == [3]


def test_a_run_whose_rows_are_all_dead_is_a_tombstone() -> None:
    around = Neighbours()
    around.cancel((2, 2))
    ops = (SlotOp(SlotOpKind.RELEASE, 9, 1, 0, 1),)
    (tombstone,) = sent(around.run(2, *TREE, ops=ops, work_us=7, slowest_us=5), Run)
    assert tombstone == Run(2, is_tombstone=True, wants=Wants.NOTHING, work_us=7, slowest_us=5, ops=ops)


def test_rows_and_runs_may_be_cancelled_by_one_message() -> None:
    around = Neighbours()
    around.cancel((2, 4), (3, NO_SLOT))
    assert slots(compute_of(around.run(2, *TREE))) == [2, 3, 5]
    around.run(3, Row(14, 6, 5, 5, 1))
    assert [run.is_tombstone for run in sent(around.computed(2, rows=3), Run)] == [False, True]


@pytest.mark.parametrize("advice", [[(2, NO_SLOT), (2, 3)], [(2, 3), (2, NO_SLOT)]], ids=str)
def test_a_dead_run_stays_dead_whatever_is_said_of_its_rows(advice: list[tuple[int, int]]) -> None:
    around = Neighbours()
    for one in advice:
        around.cancel(one)
    assert sent(around.run(2, *TREE), Run)[0].is_tombstone


def test_a_dead_run_is_abandoned_once() -> None:
    around = Neighbours()
    around.run(2, *TREE)
    assert around.cancel((2, NO_SLOT)) == [Abandon(2)]
    assert around.cancel((2, NO_SLOT)) == []


def test_what_is_over_need_not_be_cancelled() -> None:
    around = Neighbours()
    around.run(2, *TREE)
    around.computed(2, rows=4)
    around.cancel((2, 3), (1, NO_SLOT), (3, 6))
    assert around.stage._cancelled == {3: {6}}
    around.run(3, Row(14, 6, 5, 5, 1))
    assert around.stage._cancelled == {}


# Advice is relayed.


def test_advice_is_passed_on_backwards_as_it_came() -> None:
    (advice,) = sends(Neighbours(LAST).cancel((2, 3), (3, NO_SLOT), relay=True))
    assert advice.message == Message(LAST, MIDDLE, Cancel(True, (Cancelled(2, 3, 1), Cancelled(3, NO_SLOT, 1))))
    assert advice.message.kind == "Cancel"


def test_advice_ends_at_the_first_stage() -> None:
    assert sends(Neighbours(FIRST).cancel((2, 3), relay=True)) == []


@pytest.mark.parametrize("old", [(2, 3), (2, NO_SLOT), (1, 0)], ids=str)
def test_repeated_advice_does_not_multiply(old: tuple[int, int]) -> None:
    around = Neighbours(LAST)
    around.cancel(old, relay=True)
    assert sends(around.cancel(old, relay=True)) == []


def test_a_row_of_a_dead_run_is_not_relayed() -> None:
    around = Neighbours(LAST)
    around.cancel((2, NO_SLOT), relay=True)
    assert sends(around.cancel((2, 3), relay=True)) == []
    assert len(sends(around.cancel((2, 3), (3, 6), relay=True))) == 1


# How the last stage draws.


def test_how_tokens_are_drawn_is_passed_on_to_the_last_stage() -> None:
    sampling = Sampling(0.5, 7, 0.25, 0.125, 1.5, seed=1 << 40)
    (passed_on,) = sends(Neighbours(MIDDLE).tell(sampling.settings(1, 0)))
    assert (passed_on.message.dest, passed_on.message.body) == (LAST, sampling.settings(1, 0))
    assert type(passed_on.message.body) is Settings
    assert Neighbours(LAST).tell(sampling.settings(1, 0)) == []


def test_every_row_draws_the_token_after_it() -> None:
    around, sampling = Neighbours(LAST), Sampling(0.5, seed=9)
    around.tell(sampling.settings(1, 0))
    command = compute_of(around.run(2, *TREE))
    assert (command.rows, command.choices) == ((0, 1, 2, 3), 1)
    assert command.draw is not None
    assert (command.draw.samplings, command.draw.is_guess) == ((sampling,) * 4, False)
    assert command.draw.positions.tolist() == [3, 4, 4, 5]
    assert command.draw.seen == (), "nothing is penalised"


def test_a_penalty_is_for_what_the_row_itself_descends_from() -> None:
    around = Neighbours(LAST)
    around.tell(Sampling(repetition_penalty=1.5).settings(1, 0))
    draw = compute_of(around.run(2, *TREE)).draw
    assert draw is not None
    assert [tokens.tolist() for tokens in draw.seen] == [[1, 2, 10], [1, 2, 10, 11], [1, 2, 10, 12], [1, 2, 10, 11, 13]]


def test_rows_of_several_sequences_are_drawn_by_their_own_settings() -> None:
    around, first, second = Neighbours(LAST), Sampling(0.5, seed=9), Sampling(0.75, repetition_penalty=1.5)
    around.tell(first.settings(1, 0))
    around.tell(second.settings(2, 0))
    rows = (Row(7, 2, NO_SLOT, 2, 1), Row(8, 3, 2, 3, 1), Row(5, 4, NO_SLOT, 0, 2), Row(6, 5, NO_SLOT, 0, 3))
    draw = compute_of(around.run(2, *rows)).draw
    assert draw is not None
    assert draw.samplings == (first, first, second, GREEDY)
    assert [tokens.tolist() for tokens in draw.seen] == [[], [], [5], []]


def test_the_last_row_of_each_sequence_is_wanted() -> None:
    around = Neighbours(LAST)
    around.tell(Sampling(0.5).settings(2, 0))
    rows = (Row(7, 2, NO_SLOT, 2, 1), Row(8, 3, NO_SLOT, 3, 1), Row(5, 4, NO_SLOT, 0, 2), Row(4, 5, NO_SLOT, 0, 3))
    command = compute_of(around.run(2, *rows, is_canonical=True, wants=Wants.LAST))
    assert (command.rows, command.choices) == ((1, 2, 3), 1)
    assert command.draw is not None
    assert command.draw.samplings == (GREEDY, Sampling(0.5), GREEDY)
    (result,) = sent(around.computed(2, rows=3), Result)
    assert [(row.token, row.slot, row.position, row.sequence) for row in result.rows] == [
        (90, 3, 3, 1), (91, 4, 0, 2), (92, 5, 0, 3),
    ]  # fmt: skip


def test_each_row_has_as_many_most_probable_tokens_as_its_sequence_wants() -> None:
    around = Neighbours(LAST)
    rows = (Row(7, 2, NO_SLOT, 2, 1), Row(8, 3, 2, 3, 1), Row(5, 4, NO_SLOT, 0, 2))
    around.run(2, *rows)
    choices = [[(4, -0.5), (4, -0.5), (6, -1.0)], [(3, -2.0), (1, -0.5), (3, -2.0)], [(9, -0.25)]]
    (result,) = sent(around.stage.handle(Computed(2, None, choices, 0.0), 0.0), Result)
    assert [(row.token, row.logp, row.top_count) for row in result.rows] == [(4, -0.5, 2), (3, -2.0, 2), (9, -0.25, 0)]
    assert result.tops() == [((4, -0.5), (6, -1.0)), ((1, -0.5), (3, -2.0)), ()]
    assert all(type(pair) is TopToken for pair in result.top)


def test_penalties_of_what_was_generated_begin_at_the_prompt_s_length() -> None:
    around = Neighbours(LAST)
    around.tell(Sampling(presence_penalty=0.5).settings(1, 1))
    draw = compute_of(around.run(2, *TREE)).draw
    assert draw is not None
    assert [tokens.tolist() for tokens in draw.generated] == [[2, 10], [2, 10, 11], [2, 10, 12], [2, 10, 11, 13]]


def test_rows_that_died_are_not_drawn_for() -> None:
    around = Neighbours(LAST)
    around.cancel((2, 3))
    command = compute_of(around.run(2, *TREE))
    assert command.draw is not None
    assert (command.rows, command.draw.positions.tolist()) == ((0, 1), [3, 4])
    (result,) = sent(around.computed(2), Result)
    assert result.rows == (ResultRow(90, 2, 2, -0.5, 1), ResultRow(91, 4, 3, -0.5, 1))


def draw_of(commands: list[Command]) -> Sampling:
    draw = compute_of(commands).draw
    assert draw is not None
    (sampling,) = draw.samplings
    return sampling


def test_settings_are_kept_by_sequence_until_it_is_freed() -> None:
    """Two sequences with runs in turn draw each by their own; another one, and one that was freed, are greedy."""
    around, first, second = Neighbours(LAST), Sampling(0.5, seed=9), Sampling(0.75, seed=8)
    for sequence, sampling in ((1, first), (2, second)):
        around.tell(sampling.settings(sequence, 0))
    for run, slot, sequence, sampling in ((2, 2, 1, first), (3, 3, 2, second), (4, 4, 1, first), (5, 5, 3, GREEDY)):
        row = Row(7, slot, NO_SLOT, 2 if sequence == 1 else 0, sequence)
        assert draw_of(around.run(run, row)) == sampling
        around.computed(run, rows=1)
    free = SlotOp(SlotOpKind.FREE, sequence=1)
    assert draw_of(around.run(6, Row(7, 6, 3, 1, 2), ops=(free,))) == second, (
        "another sequence's end is none of its own"
    )
    around.computed(6, rows=1)
    assert draw_of(around.run(7, Row(7, 0, NO_SLOT, 0, 1))) == GREEDY


def test_a_skipped_run_that_frees_a_sequence_forgets_its_settings_too() -> None:
    around, sampling = Neighbours(LAST), Sampling(0.5, seed=9)
    around.tell(sampling.settings(1, 0))
    around.cancel((2, NO_SLOT))
    (tombstone,) = sent(around.run(2, Row(7, 2, NO_SLOT, 0, 2), ops=(SlotOp(SlotOpKind.FREE, sequence=1),)), Result)
    assert tombstone.is_tombstone
    assert draw_of(around.run(3, Row(7, 0, NO_SLOT, 0, 1))) == GREEDY


def test_others_do_not_draw() -> None:
    command = compute_of(Neighbours(MIDDLE).run(2, *TREE))
    assert (command.draw, command.rows, command.choices) == (None, (), 0)


# What a run has cost.


@pytest.mark.parametrize(("address", "kind"), [(MIDDLE, Run), (LAST, Result)])
def test_a_run_says_what_it_has_cost_so_far(address: int, kind: type[Run] | type[Result]) -> None:
    around = Neighbours(address)
    around.run(2, *TREE, work_us=400_000, slowest_us=250_000)
    (found,) = sent(around.computed(2, rows=4, seconds=0.5), kind)
    assert (found.work_us, found.slowest_us) == (900_000, 500_000)


def test_a_cost_that_does_not_fit_is_the_largest_that_does() -> None:
    around = Neighbours()
    around.run(2, *TREE, work_us=0xFFFFFFFF, slowest_us=1)
    (run,) = sent(around.computed(2, rows=4, seconds=1e9), Run)
    assert (run.work_us, run.slowest_us) == (0xFFFFFFFF, 0xFFFFFFFF)


# Credits.


@pytest.mark.parametrize("is_early", [True, False])
def test_a_credit_leaves_early_or_when_the_run_is_through(is_early: bool) -> None:
    stage = Stage(FIRST, STAGES, capacity=16, window=8, credits_early=is_early)
    run = Run(1, is_canonical=True, rows=(Row(1, 0, NO_SLOT, 0, 1),))
    at_once = sent(stage.handle(Received(Message(ORCHESTRATOR, FIRST, run, txn=1)), 0.0), Credit)
    at_the_end = sent(stage.handle(Computed(1, np.zeros(1)), 1.0), Credit)
    assert (len(at_once), len(at_the_end)) == ((1, 0) if is_early else (0, 1))


def test_a_credit_tells_what_the_last_run_took_but_not_the_prompt_or_one_that_was_given_up() -> None:
    around = Neighbours(FIRST)
    assert sent(around.run(2, *TREE), Credit) == [Credit(2)]
    around.computed(2, rows=4, seconds=0.25)
    assert sent(around.run(3, Row(14, 6, 5, 5, 1)), Credit) == [Credit(3, 4, 250_000)]
    around.cancel((3, NO_SLOT))
    around.stage.handle(Computed(3, seconds=0.25), 0.0)
    assert sent(around.run(4, Row(15, 7, 5, 5, 1)), Credit) == [Credit(4, 4, 250_000)]


def test_a_foreign_message_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="stage 1 got DraftOrder"):
        Neighbours().tell(DraftOrder(1, passes=1), ORCHESTRATOR)


# Rows whose numbers are not finite.


def test_a_faulty_row_travels_on_without_its_token_and_the_first_layer_counts() -> None:
    around = Neighbours()
    marked = TREE[1]._replace(token=fault_token(0))
    around.run(2, TREE[0], marked, *TREE[2:])
    (passed_on,) = sent(around.stage.handle(Computed(2, np.zeros(4), faults={0: 5, 1: 6}), 0.0), Run)
    assert passed_on.rows == (TREE[0]._replace(token=fault_token(5)), marked, *TREE[2:])


def test_the_last_stage_says_the_layer_and_no_number_that_is_none() -> None:
    around = Neighbours(LAST)
    around.run(2, *TREE[:3])
    choices = [[(90, -0.5)], [(91, float("nan"))], []]
    (result,) = sent(around.stage.handle(Computed(2, choices=choices, faults={1: 7, 2: 9}), 0.0), Result)
    assert result.rows == (ResultRow(90, 2, 2, -0.5, 1), ResultRow(-8, 3, 3, 0.0, 1), ResultRow(-10, 4, 3, 0.0, 1))
    assert [fault_layer(row.token) for row in result.rows] == [None, 7, 9]


@pytest.mark.parametrize(("wants", "chosen"), [(Wants.NOTHING, []), (Wants.LAST, [ResultRow(90, 3, 3, -0.5, 1)])])
def test_faulty_rows_of_a_prompt_come_back_unasked(wants: Wants, chosen: list[ResultRow]) -> None:
    around = Neighbours(LAST)
    rows = at(1, Row(5, 2, NO_SLOT, 2), Row(6, 3, NO_SLOT, 3))
    around.run(2, *rows, is_canonical=True, wants=wants)
    choices = [[(90, -0.5)] for _ in chosen]
    (result,) = sent(around.stage.handle(Computed(2, choices=choices, faults={0: 1}), 0.0), Result)
    assert result.rows == (ResultRow(fault_token(1), 2, 2, 0.0, 1), *chosen)
