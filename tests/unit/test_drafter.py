"""A drafter that works to order, step by step; how it keeps guessing without one is seen in whole worlds."""

from __future__ import annotations

import pytest

from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import Close, Run
from pipeinfer.core.ports import Abandon, Compute, Computed, Sampling
from pipeinfer.core.slots import attended, visible_slots
from speculation.drafter.machine import MOST_FAULTY
from speculation.schedules.cost_curve import CostCurve
from tests.unit.told_drafter import FIRST, ROOT, SECOND, Told, compute_of, evaluated, nodes, said


def test_an_order_is_so_many_passes_and_the_last_one_says_so() -> None:
    told = Told()
    assert evaluated(told.order(2)) == [7]
    commands = told.computed([(4, 0.9)])
    assert (nodes(commands), evaluated(commands)) == ([([(4, ROOT)], False)], [4])
    commands = told.computed([(5, 0.9)])
    (found, is_done), *others = nodes(commands)
    assert ([token for token, _ in found], is_done, others) == ([5], True, [])
    assert not [command for command in commands if isinstance(command, Compute)]
    assert told.accept(4, 5, 6) == [], "and no more"


def test_the_next_order_goes_on_from_there() -> None:
    told = Told()
    told.order(1)
    told.computed([(4, 0.9)])
    assert evaluated(told.order(1)) == [4]


def test_nothing_below_the_cutoff_is_sent_and_the_order_ends_there() -> None:
    told = Told()
    told.order(3, cutoff=0.5)
    told.computed([(4, 0.6)])
    commands = told.computed([(5, 0.4)])
    assert nodes(commands) == [([], True)]
    assert not [command for command in commands if isinstance(command, Compute)]


def test_what_was_held_back_answers_a_lower_order_without_a_pass() -> None:
    told = Told()
    told.order(3, cutoff=0.5)
    told.computed([(4, 0.4)])
    assert nodes(told.order(3, cutoff=0.45)) == [([], True)]
    commands = told.order(3, cutoff=0.3)
    assert (nodes(commands), evaluated(commands)) == ([([(4, ROOT)], False)], [4])
    commands = told.computed([(5, 0.9)])
    assert nodes(commands)[0][1] is False, "two passes are left"
    assert nodes(told.computed([(6, 0.9)]))[0][1] is True


def test_passes_that_were_not_needed_are_not_kept_for_later() -> None:
    told = Told(max_ahead=1)
    told.order(5)
    told.computed([(4, 0.9)])
    assert nodes(told.computed([(5, 0.9)]))[-1] == ([], True), "it may be one node ahead, not more"
    assert told.accept(4) == []


def test_to_begin_again_is_to_forget_and_to_look_at_the_newest_token_once_more() -> None:
    told = Told()
    told.order(2)
    told.computed([(4, 0.9)])
    told.computed([(5, 0.9)])
    command = compute_of(told.order(2, restart=True))
    assert command.batch.tokens.tolist() == [7]
    assert visible_slots(command.batch)[0].sum() == 4, "the prompt and itself, in a slot of its own"
    commands = told.computed([(4, 0.9)])
    assert nodes(commands) == [([(4, ROOT)], False)]
    assert told.tree().size == 2
    assert evaluated(commands) == [4]


def test_what_was_held_back_is_forgotten_with_the_rest() -> None:
    told = Told()
    told.order(3, cutoff=0.5)
    told.computed([(4, 0.4)])
    assert evaluated(told.order(3, restart=True)) == [7]


def test_slots_of_what_was_forgotten_are_free_again() -> None:
    told = Told()
    for _ in range(50):
        told.order(3, restart=True)
        for token in (4, 5, 6):
            told.computed([(token, 0.9)])
    told.drafter._allocator.check()
    assert len(told.drafter._allocator._leased) <= 9


def test_a_pass_over_what_is_forgotten_is_given_up() -> None:
    told = Told()
    told.order(3)
    told.computed([(4, 0.9)])
    assert told.order(3, restart=True) == [Abandon(told.busy)]
    assert evaluated(told.drafter.handle(Computed(told.busy), 0.0)) == [7]


@pytest.mark.parametrize("passes", [1, 3])
def test_an_order_after_the_last_position_of_use_is_done_at_once(passes: int) -> None:
    told = Told()
    told.accept(*range(17))  # to position 20
    assert len(evaluated(told.order(passes))) == 17, "what it has not seen yet"
    assert nodes(told.computed()) == [([], True)]
    assert nodes(told.order(passes)) == [([], True)]


def test_a_pass_reaches_the_root_whatever_rows_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over tokens above the root alone would find nothing, and the next one as little, for ever."""
    monkeypatch.setattr(CostCurve, "best_count", lambda curve, useful: min(1, len(useful)))
    told = Told(govern=True)
    assert evaluated(told.order(1)) == [7]
    told.computed([(4, 0.9)])
    told.accept(4, 5, 6)
    commands = told.order(1)
    assert evaluated(commands) == [4, 5, 6]
    assert compute_of(commands).rows == (2,), "the root is among them"


def test_the_end_of_the_request_ends_the_order() -> None:
    told = Told()
    told.order(2)
    assert told.say(Close(FIRST)) == [Abandon(told.busy)]
    assert told.computed([(4, 0.9)]) == []


def test_guesses_are_drawn_as_the_target_will_draw() -> None:
    sampling = Sampling(0.5, seed=1 << 50)
    told = Told(sampling)
    draw = compute_of(told.order(1)).draw
    assert draw is not None
    assert (draw.samplings, draw.positions.tolist(), draw.is_guess) == ((sampling,), [4], True)


def test_an_order_of_no_passes_ends_what_was_held_back_and_evaluates_nothing() -> None:
    """Found by reading: the choices held back counted as one pass, and one less than none never ends."""
    told = Told(topk=2)
    told.order(1, cutoff=0.5)
    told.computed([(4, 0.6), (5, 0.3)])
    commands = told.order(0, cutoff=0.1)
    assert [token for found, _ in nodes(commands) for token, _ in found] == [5]
    assert not [command for command in commands if isinstance(command, Compute)]


def test_a_faulty_row_has_no_children_and_the_order_is_answered() -> None:
    told = Told(topk=2, draft_batch=2)
    told.order(2)
    assert evaluated(told.computed([(4, 0.6), (5, 0.3)])) == [4, 5]
    ((found, is_done),) = nodes(told.computed([(6, 0.9)], [(8, 0.9)], faulty=(0,)))
    assert ([token for token, _ in found], is_done) == ([8], True)


def test_a_draft_of_faulty_rows_alone_is_heard_no_more_in_this_request() -> None:
    told = Told()
    for token in range(MOST_FAULTY):
        assert evaluated(told.order(3)), "it tries"
        assert nodes(told.computed([(4, 0.9)], faulty=(0,))) == [([], True)]
        told.accept(20 + token)
    assert nodes(told.order(3)) == [([], True)], "it has given up, and says so at once"


@pytest.mark.parametrize(("positions", "depth"), [(4, 1), (5, 2), (6, 3), (0, 5)])
def test_nothing_beyond_the_draft_s_positions_is_evaluated(positions: int, depth: int) -> None:
    """The root is at position 3; a node at the last position may still have children."""
    told = Told(positions=positions)
    commands, passes = told.order(5), 0
    while compute := [command for command in commands if isinstance(command, Compute)]:
        passes += 1
        assert compute[0].batch.positions.max() < (positions or 64)
        commands = told.computed([(30 + passes, 0.9)])
    assert passes == depth
    assert nodes(commands)[-1][1], "the order is answered"


def test_a_prompt_longer_than_the_draft_is_not_read() -> None:
    told = Told(positions=2)
    assert told.busy == 0
    assert nodes(told.order(5)) == [([], True)]
    assert told.accept(5, 6) == []
    assert nodes(told.order(1, restart=True)) == [([], True)]


# Sequences.


def test_a_prompt_is_read_between_two_orders_and_one_pass_then_serves_both_sequences() -> None:
    told, sampling = Told(), Sampling(0.5, seed=3)
    told.order(1)
    assert told.begin(SECOND, (8, 9), sampling) == [], "a pass is under way"
    assert told.order(2, sequence=SECOND) == []
    command = compute_of(first := told.computed([(4, 0.9)]))
    assert [(body.sequence, body.root, body.ends_order) for body in said(first)] == [(FIRST, 3, True)]
    assert command.batch.tokens.tolist() == [8, 9], "its own prompt"
    assert command.batch.positions.tolist() == [0, 1]
    assert command.draw is not None
    assert (command.draw.samplings, command.draw.positions.tolist()) == ((sampling,), [2])
    assert told.order(1) == [], "a pass is under way"
    commands = told.computed([(6, 0.9)])
    assert [(body.sequence, body.root, body.ends_order) for body in said(commands)] == [(SECOND, 1, False)]
    assert compute_of(commands).batch.tokens.tolist() == [4, 6], "the first sequence has an order again"
    commands = told.computed([(5, 0.9)], [(7, 0.9)])
    assert [(body.sequence, body.ends_order) for body in said(commands)] == [(FIRST, True), (SECOND, False)]
    assert compute_of(commands).batch.tokens.tolist() == [7]


def test_a_sequence_attends_to_nothing_of_another_one() -> None:
    told = Told()
    told.order(1)
    told.begin(SECOND, (8, 9))
    told.order(1, sequence=SECOND)
    first = set(attended(compute_of(told.computed([(4, 0.9)])).batch, 1).tolist())
    told.order(1)
    both = compute_of(told.computed([(6, 0.9)])).batch
    assert len(first) == 2
    assert len(attended(both, 0)) == 5, "three of its prompt, 7 and 4"
    assert not first & set(attended(both, 0).tolist())


def test_the_end_of_a_sequence_frees_its_slots_and_leaves_the_other_one_alone() -> None:
    told = Told()
    told.order(1)
    told.begin(SECOND, (8, 9))
    told.order(1, sequence=SECOND)
    for token in (4, 6, 3):
        told.computed([(token, 0.9)])
    allocator = told.drafter._allocator
    assert (allocator.length(FIRST), allocator.length(SECOND)) == (4, 2)
    free, leased, canonical = allocator.counts()
    assert told.say(Close(FIRST)) == []
    assert allocator.counts() == (free + 4, leased, canonical - 4)
    allocator.check()
    assert told.accept(6, sequence=SECOND) == []
    command = compute_of(told.order(1, sequence=SECOND))
    assert (command.batch.tokens.tolist(), command.batch.positions.tolist()) == ([3], [3])
    assert told.drafter._table.counts()[1:] == (1, 3), "the operations reached the shard's table"
    with pytest.raises(RemoteProtocolError, match="before the sequence began"):
        told.order(1)


def test_the_end_of_a_sequence_gives_up_its_pass_and_the_next_one_has_its_turn() -> None:
    told = Told()
    told.order(2)
    told.begin(SECOND, (8, 9))
    told.order(1, sequence=SECOND)
    assert told.say(Close(FIRST)) == [Abandon(told.busy)]
    commands = told.drafter.handle(Computed(told.busy), 0.0)
    assert said(commands) == []
    assert compute_of(commands).batch.tokens.tolist() == [8, 9]


def test_a_foreign_message_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="drafter 0 got Run"):
        Told().say(Run(1))
