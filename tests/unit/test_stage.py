"""A stage between its neighbours: what is skipped on advice, what it passes on, and how the last one draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.ports import GREEDY, Abandon, Command, Compute, Computed, Received, Sampling, Send
from pipeinfer.core.protocol import (
    FIRST_STAGE,
    NO_SLOT,
    ORCHESTRATOR,
    Edges,
    Flag,
    Kind,
    Message,
    ResultRow,
    Row,
    SettingRow,
    SlotOp,
    SlotOpKind,
    fault_layer,
    fault_token,
)
from stages.stage.machine import Stage

STAGES = 3
FIRST, MIDDLE, LAST = FIRST_STAGE, FIRST_STAGE + 1, FIRST_STAGE + 2
TREE = (Row(10, 2, NO_SLOT, 2), Row(11, 3, 2, 3), Row(12, 4, 2, 3), Row(13, 5, 3, 4))
"""A guess, two after it, and one after the first of those. The prompt is in slots 0 and 1."""


class Neighbours:
    """One stage of three, and all that others tell it. Its prompt is through, as run 1."""

    def __init__(self, address: int = MIDDLE) -> None:
        self.stage = Stage(address, STAGES, capacity=16, window=8)
        self._edges: dict[int, Edges] = {}
        prompt = (Row(1, 0, NO_SLOT, 0), Row(2, 1, NO_SLOT, 1))
        self.run(1, *prompt, flags=Flag.CANONICAL | Flag.LAST)
        self.computed(1)

    def hear(self, message: Message, payload: Any = None) -> list[Command]:
        return self.stage.handle(Received(message, payload), 0.0)

    def _tell(self, kind: Kind, source: int, **fields: Any) -> list[Command]:
        txn = self._edges.setdefault(source, Edges(source)).stamp(self.stage.address)
        return self.hear(Message(kind, source, self.stage.address, txn=txn, request=1, **fields))

    def run(self, number: int, *rows: Row, **fields: Any) -> list[Command]:
        return self._tell(Kind.RUN, self.stage.address - 1, run=number, rows=rows, **fields)

    def request(self, sampling: Sampling) -> list[Command]:
        return self._tell(Kind.REQUEST, self.stage.address - 1, rows=sampling.rows())

    def cancel(self, *rows: tuple[int, int], flags: Flag = Flag.NONE) -> list[Command]:
        """Advice about (run, slot) or (run, NO_SLOT)."""
        advice = tuple(Row(0, run, slot, 0) for run, slot in rows)
        return self.hear(Message(Kind.CANCEL, ORCHESTRATOR, self.stage.address, flags, rows=advice))

    def computed(self, run: int, rows: int = 2, seconds: float = 0.0) -> list[Command]:
        is_last = self.stage.address == LAST
        choices = [[(90 + row, -0.5)] for row in range(rows)] if is_last else None
        if is_last and run == 1:
            choices = choices[:1] if choices else None
        return self.stage.handle(Computed(run, None if is_last else np.zeros(rows), choices, seconds), 0.0)


def compute_of(commands: list[Command]) -> Compute:
    (found,) = [command for command in commands if isinstance(command, Compute)]
    return found


def sent(commands: list[Command], *kinds: Kind) -> list[Message]:
    found = [command.message for command in commands if isinstance(command, Send)]
    return [message for message in found if message.kind in kinds or not kinds]


def slots(compute: Compute) -> list[int]:
    return [int(slot) for slot in compute.batch.slots]


# Single rows are cancelled.


def test_a_dead_row_leaves_its_run_and_takes_its_descendants_along() -> None:
    around = Neighbours()
    assert around.cancel((2, 3)) == []
    command = compute_of(around.run(2, *TREE))
    assert slots(command) == [2, 4]
    assert command.keep == (0, 2), "these activations of the stage before stay"
    (passed_on,) = sent(around.computed(2))
    assert (passed_on.kind, passed_on.rows) == (Kind.RUN, (TREE[0], TREE[2]))


def test_news_of_a_row_reaches_a_run_that_waits() -> None:
    around = Neighbours()
    around.run(2, *TREE)
    around.run(3, Row(14, 6, 5, 5), Row(15, 7, 4, 4))
    around.cancel((3, 6))
    assert slots(compute_of(around.computed(2, rows=4))) == [7]


def test_a_row_that_is_being_computed_is_computed_to_the_end() -> None:
    around = Neighbours()
    around.run(2, *TREE)
    assert around.cancel((2, 3)) == []
    (passed_on,) = sent(around.computed(2, rows=4))
    assert passed_on.rows == TREE


def test_a_row_of_another_run_in_the_same_slot_is_none_of_its_business() -> None:
    around = Neighbours()
    around.cancel((2, 3))
    around.run(2, *TREE)
    around.computed(2)
    release = SlotOp(SlotOpKind.RELEASE, 3, 1), SlotOp(SlotOpKind.RELEASE, 5, 1)
    assert slots(compute_of(around.run(3, Row(16, 3, 2, 3), ops=release))) == [3]


def test_a_run_whose_rows_are_all_dead_is_a_tombstone() -> None:
    around = Neighbours()
    around.cancel((2, 2))
    ops = (SlotOp(SlotOpKind.RELEASE, 9, 1),)
    (tombstone,) = sent(around.run(2, *TREE, ops=ops, work_us=7, slowest_us=5))
    assert (tombstone.kind, tombstone.flags, tombstone.rows, tombstone.ops) == (Kind.RUN, Flag.TOMBSTONE, (), ops)
    assert (tombstone.work_us, tombstone.slowest_us) == (7, 5)


def test_rows_and_runs_may_be_cancelled_by_one_message() -> None:
    around = Neighbours()
    around.cancel((2, 4), (3, NO_SLOT))
    assert slots(compute_of(around.run(2, *TREE))) == [2, 3, 5]
    around.run(3, Row(14, 6, 5, 5))
    assert [message.flags for message in sent(around.computed(2, rows=3))] == [Flag.NONE, Flag.TOMBSTONE]


@pytest.mark.parametrize("advice", [[(2, NO_SLOT), (2, 3)], [(2, 3), (2, NO_SLOT)]], ids=str)
def test_a_dead_run_stays_dead_whatever_is_said_of_its_rows(advice: list[tuple[int, int]]) -> None:
    around = Neighbours()
    for one in advice:
        around.cancel(one)
    assert sent(around.run(2, *TREE))[0].flags == Flag.TOMBSTONE


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
    around.run(3, Row(14, 6, 5, 5))
    assert around.stage._cancelled == {}


# Advice is relayed.


def test_advice_is_passed_on_backwards_as_it_came() -> None:
    (advice,) = sent(Neighbours(LAST).cancel((2, 3), (3, NO_SLOT), flags=Flag.RELAY))
    assert (advice.kind, advice.source, advice.dest, advice.flags) == (Kind.CANCEL, LAST, MIDDLE, Flag.RELAY)
    assert [(row[1], row[2]) for row in advice.rows] == [(2, 3), (3, NO_SLOT)]


def test_advice_ends_at_the_first_stage() -> None:
    assert sent(Neighbours(FIRST).cancel((2, 3), flags=Flag.RELAY)) == []


@pytest.mark.parametrize("old", [(2, 3), (2, NO_SLOT), (1, 0)], ids=str)
def test_a_word_that_is_no_news_does_not_multiply(old: tuple[int, int]) -> None:
    around = Neighbours(LAST)
    around.cancel(old, flags=Flag.RELAY)
    assert sent(around.cancel(old, flags=Flag.RELAY)) == []


def test_a_row_of_a_dead_run_is_no_news() -> None:
    around = Neighbours(LAST)
    around.cancel((2, NO_SLOT), flags=Flag.RELAY)
    assert sent(around.cancel((2, 3), flags=Flag.RELAY)) == []
    assert len(sent(around.cancel((2, 3), (3, 6), flags=Flag.RELAY))) == 1


# How the last stage draws.


def test_how_tokens_are_drawn_is_passed_on_to_the_last_stage() -> None:
    sampling = Sampling(0.5, 7, 0.25, 0.125, 1.5, seed=1 << 40)
    (passed_on,) = sent(Neighbours(MIDDLE).request(sampling))
    assert (passed_on.kind, passed_on.dest, passed_on.rows) == (Kind.REQUEST, LAST, sampling.rows())
    assert Neighbours(LAST).request(sampling) == []


def test_every_row_draws_the_token_after_it() -> None:
    around, sampling = Neighbours(LAST), Sampling(0.5, seed=9)
    around.request(sampling)
    command = compute_of(around.run(2, *TREE))
    assert (command.rows, command.choices) == ((0, 1, 2, 3), 1)
    assert command.draw is not None
    assert (command.draw.sampling, command.draw.is_guess) == (sampling, False)
    assert command.draw.positions.tolist() == [3, 4, 4, 5]
    assert command.draw.seen == (), "nothing is penalised"


def test_a_penalty_is_for_what_the_row_itself_descends_from() -> None:
    around = Neighbours(LAST)
    around.request(Sampling(repetition_penalty=1.5))
    draw = compute_of(around.run(2, *TREE)).draw
    assert draw is not None
    assert [tokens.tolist() for tokens in draw.seen] == [[1, 2, 10], [1, 2, 10, 11], [1, 2, 10, 12], [1, 2, 10, 11, 13]]


def test_rows_that_died_are_not_drawn_for() -> None:
    around = Neighbours(LAST)
    around.cancel((2, 3))
    command = compute_of(around.run(2, *TREE))
    assert command.draw is not None
    assert (command.rows, command.draw.positions.tolist()) == ((0, 1), [3, 4])
    (result,) = sent(around.computed(2))
    assert result.rows == (ResultRow(90, 2, 2, -0.5), ResultRow(91, 4, 3, -0.5))


def test_the_request_before_is_forgotten() -> None:
    around = Neighbours(LAST)
    around.request(Sampling(0.5, seed=9))
    around.request(GREEDY)
    draw = compute_of(around.run(2, *TREE)).draw
    assert draw is not None
    assert draw.sampling == GREEDY


def test_others_do_not_draw() -> None:
    command = compute_of(Neighbours(MIDDLE).run(2, *TREE))
    assert (command.draw, command.rows, command.choices) == (None, (), 0)


# What a run has cost.


@pytest.mark.parametrize(("address", "kind"), [(MIDDLE, Kind.RUN), (LAST, Kind.RESULT)])
def test_a_run_says_what_it_has_cost_so_far(address: int, kind: Kind) -> None:
    around = Neighbours(address)
    around.run(2, *TREE, work_us=400_000, slowest_us=250_000)
    (message,) = sent(around.computed(2, rows=4, seconds=0.5), kind)
    assert (message.work_us, message.slowest_us) == (900_000, 500_000)


def test_a_cost_that_does_not_fit_is_the_largest_that_does() -> None:
    around = Neighbours()
    around.run(2, *TREE, work_us=0xFFFFFFFF, slowest_us=1)
    (message,) = sent(around.computed(2, rows=4, seconds=1e9))
    assert (message.work_us, message.slowest_us) == (0xFFFFFFFF, 0xFFFFFFFF)


# Credits.


@pytest.mark.parametrize("is_early", [True, False])
def test_a_credit_leaves_early_or_when_the_run_is_through(is_early: bool) -> None:
    stage = Stage(FIRST, STAGES, capacity=16, window=8, credits_early=is_early)
    rows = (Row(1, 0, NO_SLOT, 0),)
    message = Message(Kind.RUN, ORCHESTRATOR, FIRST, Flag.CANONICAL, 1, txn=1, run=1, rows=rows)
    at_once = sent(stage.handle(Received(message), 0.0), Kind.CREDIT)
    at_the_end = sent(stage.handle(Computed(1, np.zeros(1)), 1.0), Kind.CREDIT)
    assert (len(at_once), len(at_the_end)) == ((1, 0) if is_early else (0, 1))


def test_a_credit_tells_what_the_last_run_took_but_not_the_prompt_or_one_that_was_given_up() -> None:
    around = Neighbours(FIRST)
    (credit,) = sent(around.run(2, *TREE), Kind.CREDIT)
    assert credit.rows == ()
    around.computed(2, rows=4, seconds=0.25)
    (credit,) = sent(around.run(3, Row(14, 6, 5, 5)), Kind.CREDIT)
    assert credit.rows == (SettingRow(0, 4, 250_000, 0.0),)
    around.cancel((3, NO_SLOT))
    around.stage.handle(Computed(3, seconds=0.25), 0.0)
    (credit,) = sent(around.run(4, Row(15, 7, 5, 5)), Kind.CREDIT)
    assert credit.rows == (SettingRow(0, 4, 250_000, 0.0),)


def test_a_foreign_message_is_refused() -> None:
    around = Neighbours()
    message = Message(Kind.ORDER, ORCHESTRATOR, MIDDLE, txn=1, rows=(SettingRow(0, 1, 0, 0.0),))
    with pytest.raises(RemoteProtocolError, match="stage 1 got ORDER"):
        around.hear(message)


# Rows whose numbers are not finite.


def test_a_faulty_row_travels_on_without_its_token_and_the_first_layer_counts() -> None:
    around = Neighbours()
    marked = TREE[1]._replace(token=fault_token(0))
    around.run(2, TREE[0], marked, *TREE[2:])
    (passed_on,) = sent(around.stage.handle(Computed(2, np.zeros(4), faults={0: 5, 1: 6}), 0.0))
    assert passed_on.rows == (TREE[0]._replace(token=fault_token(5)), marked, *TREE[2:])


def test_the_last_stage_says_the_layer_and_no_number_that_is_none() -> None:
    around = Neighbours(LAST)
    around.run(2, *TREE[:3])
    choices = [[(90, -0.5)], [(91, float("nan"))], []]
    (result,) = sent(around.stage.handle(Computed(2, choices=choices, faults={1: 7, 2: 9}), 0.0))
    assert result.rows == (ResultRow(90, 2, 2, -0.5), ResultRow(-8, 3, 3, 0.0), ResultRow(-10, 4, 3, 0.0))
    assert [fault_layer(row.token) for row in result.rows_as(ResultRow)] == [None, 7, 9]


@pytest.mark.parametrize(("flags", "chosen"), [(Flag.SILENT, []), (Flag.LAST, [ResultRow(90, 3, 3, -0.5)])])
def test_faulty_rows_of_a_prompt_come_back_unasked(flags: Flag, chosen: list[ResultRow]) -> None:
    around = Neighbours(LAST)
    rows = (Row(5, 2, NO_SLOT, 2), Row(6, 3, NO_SLOT, 3))
    around.run(2, *rows, flags=Flag.CANONICAL | flags)
    choices = [[(90, -0.5)] for _ in chosen]
    (result,) = sent(around.stage.handle(Computed(2, choices=choices, faults={0: 1}), 0.0))
    assert result.rows == (ResultRow(fault_token(1), 2, 2, 0.0), *chosen)
