"""A drafter that drafts for several sequences at once, step by step."""

from __future__ import annotations

from typing import Any

import pytest

from kvbuffers.slot_allocator import SlotAllocator
from pipeinfer.core.messages import MAX_ROWS, Close
from pipeinfer.core.ports import GREEDY, Abandon, Compute, Sampling
from speculation.drafter.draft_pass import PATIENCE, Offer, best_counts, choose
from speculation.drafter.machine import MOST_GUESSES, Drafter, draft_slots
from speculation.drafter.sequence import DraftSequence
from speculation.schedules.cost_curve import CostCurve
from speculation.schedules.policy import Policy
from speculation.trees.tree import Tree
from tests.unit.told_drafter import CONTEXT, FIRST, SECOND, Told, compute_of, evaluated, nodes, said

THIRD = 6
"""A sequence."""


def both(**knobs: Any) -> Told:
    """Two sequences whose prompts have been read. The roots are 7 at position 3 and 6 at position 2."""
    told = Told(**knobs)
    told.begin(SECOND, (8, 9))
    told.computed([(5, 0.9)])
    told.accept(6, sequence=SECOND)
    return told


# One pass.


def test_rows_are_sorted_by_sequence_and_results_are_split_by_it() -> None:
    told = Told(topk=2, draft_batch=2, max_num_seqs=3)
    told.begin(THIRD, (8, 9))
    told.begin(SECOND, (5,))
    for sequence in (THIRD, SECOND):
        told.computed([(50 + sequence, 0.9)])
        told.accept(sequence, sequence=sequence)
    told.begin(9, (1,))  # keeps the drafter busy
    for sequence in (FIRST, THIRD, SECOND):
        told.order(2, sequence=sequence)
    command = compute_of(told.computed([(9, 0.9)]))
    assert command.batch.tokens.tolist() == [7, SECOND, THIRD]
    assert command.rows == (0, 1, 2)
    commands = told.computed([(1, 0.6), (2, 0.3)], [(3, 0.7)], [(4, 0.8)])
    found = [(body.sequence, body.root, [row.token for row in body.nodes], body.ends_order) for body in said(commands)]
    assert found == [(FIRST, 3, [1, 2], False), (SECOND, 1, [3], False), (THIRD, 2, [4], False)]
    assert compute_of(commands).batch.tokens.tolist() == [1, 2, 3, 4]
    assert compute_of(commands).batch.sequence.tolist() == [0, 0, 1, 2]


def test_each_row_is_drawn_by_the_sampling_of_its_own_sequence() -> None:
    sampling = Sampling(0.5, seed=3, repetition_penalty=1.5)
    told = Told(topk=2, draft_batch=2)
    told.begin(SECOND, (8, 9), sampling)
    told.order(2)
    told.order(2, sequence=SECOND)
    draws = [compute_of(told.computed([(5, 0.9)])).draw]
    draws += [compute_of(told.computed([(1, 0.6), (2, 0.3)], [(3, 0.7)])).draw]
    found = [(draw.samplings, draw.positions.tolist(), draw.is_guess) for draw in draws if draw]
    assert found == [
        ((GREEDY, sampling), [4, 3], True),
        ((GREEDY, GREEDY, sampling), [5, 5, 4], True),
    ]
    assert [[seen.tolist() for seen in draw.seen] for draw in draws if draw] == [
        [[], [5, 8, 9]],
        [[], [], [3, 5, 8, 9]],
    ], "the tokens of its own sequence"


def test_one_pass_is_one_off_each_order_and_each_is_answered_once() -> None:
    told = both()
    told.order(3)
    assert told.order(1, sequence=SECOND) == [], "a pass of the first one is under way"
    assert evaluated(told.computed([(30, 0.9)])) == [30, 6]
    commands = told.computed([(31, 0.9)], [(40, 0.9)])
    assert [(body.sequence, body.ends_order) for body in said(commands)] == [(FIRST, False), (SECOND, True)]
    assert evaluated(commands) == [31]
    assert told.order(1, sequence=SECOND) == []
    commands = told.computed([(32, 0.9)])
    assert [(body.sequence, body.ends_order) for body in said(commands)] == [(FIRST, True)]
    assert evaluated(commands) == [40]
    commands = told.computed([(41, 0.9)])
    assert [(body.sequence, body.ends_order) for body in said(commands)] == [(SECOND, True)]
    assert not [command for command in commands if isinstance(command, Compute)]


def test_each_sequence_has_the_cutoff_of_its_own_order() -> None:
    told = Told()
    told.begin(SECOND, (8, 9))
    told.order(1, cutoff=0.5)
    told.order(1, cutoff=0.2, sequence=SECOND)
    told.computed([(5, 0.9)])
    commands = told.computed([(1, 0.3)], [(2, 0.3)])
    found = [([row.token for row in body.nodes], body.ends_order) for body in said(commands)]
    assert found == [([], True), ([2], True)]
    assert nodes(told.order(1, cutoff=0.1))[0][0][0][0] == 1, "it was held back"


def test_to_begin_again_in_one_sequence_leaves_the_other_ones_guesses_alone() -> None:
    told = Told()
    told.begin(SECOND, (8, 9))
    told.order(3)
    told.order(3, sequence=SECOND)
    told.computed([(5, 0.9)])
    assert evaluated(told.computed([(1, 0.9)], [(2, 0.9)])) == [1, 2]
    assert told.order(3, restart=True) == [], "the pass goes on for the second one"
    commands = told.computed([(11, 0.9)], [(12, 0.9)])
    assert [(body.sequence, [row.token for row in body.nodes]) for body in said(commands)] == [(SECOND, [12])]
    assert evaluated(commands) == [7, 12], "the first one looks at its root again"


def test_a_sequence_that_is_far_ahead_waits_and_the_other_one_goes_on() -> None:
    told = both(max_ahead=1)
    told.order(5)
    told.order(5, sequence=SECOND)
    assert evaluated(told.computed([(30, 0.9)])) == [30, 6]
    commands = told.computed([(31, 0.9)], [(40, 0.9)])
    assert [(body.sequence, body.ends_order) for body in said(commands)] == [
        (FIRST, False), (SECOND, False), (FIRST, True),
    ]  # fmt: skip
    assert evaluated(commands) == [40]


# Sequences that end, and faults.


def test_a_sequence_that_ends_during_a_pass_leaves_the_pass_to_the_others() -> None:
    told = Told()
    told.begin(SECOND, (8, 9))
    told.order(2)
    told.order(2, sequence=SECOND)
    told.computed([(5, 0.9)])
    assert told.say(Close(FIRST)) == [], "the second one needs the pass"
    commands = told.computed([(1, 0.9)], [(2, 0.9)])
    assert [(body.sequence, [row.token for row in body.nodes]) for body in said(commands)] == [(SECOND, [2])]
    told.drafter._allocator.check()
    assert told.say(Close(SECOND)) == [Abandon(told.busy)]
    assert told.computed() == []
    assert told.drafter._allocator.counts()[1:] == (0, 0)


def test_a_pass_is_given_up_when_the_last_one_that_needs_it_ends() -> None:
    told = Told()
    told.begin(SECOND, (8, 9))
    told.order(2)
    told.order(2, sequence=SECOND)
    told.computed([(5, 0.9)])
    assert told.say(Close(SECOND)) == []
    assert told.say(Close(FIRST)) == [Abandon(told.busy)]


def test_a_faulty_row_is_of_its_own_sequence_alone() -> None:
    told = Told()
    told.begin(SECOND, (8, 9))
    told.order(1)
    told.order(1, sequence=SECOND)
    told.computed([(5, 0.9)])
    commands = told.computed([(1, 0.9)], [(2, 0.9)], faulty=(1,))
    assert [(body.sequence, len(body.nodes), body.ends_order) for body in said(commands)] == [
        (FIRST, 1, True),
        (SECOND, 0, True),
    ]
    faulty = [sequence.faulty_passes for sequence in told.drafter._sequences.values()]
    assert faulty == [0, 1]


# Prompts.


def test_short_prompts_are_read_in_one_pass_and_a_long_one_in_chunks() -> None:
    told = Told(prefill_chunk=5, max_num_seqs=4)
    told.begin(SECOND, (1, 2))
    told.begin(THIRD, (3, 4))
    told.begin(7, (5, 6, 7))
    command = compute_of(told.computed([(9, 0.9)]))
    assert command.batch.tokens.tolist() == [3, 4, 5, 6, 7]
    assert (command.batch.sequence.tolist(), command.rows) == ([0, 0, 1, 1, 1], (1, 4))
    told.begin(8, tuple(range(10, 21)))
    told.begin(9, (1,))
    commands = told.computed([(1, 0.9)], [(2, 0.9)])
    assert [(body.sequence, len(body.nodes)) for body in said(commands)] == [(THIRD, 1), (7, 1)]
    chunks = [evaluated(commands)]
    chunks += [evaluated(told.computed()) for _ in range(2)]
    assert chunks == [[10, 11, 12, 13, 14], [15, 16, 17, 18, 19], [20, 1]]
    commands = told.computed([(3, 0.9)], [(4, 0.9)])
    assert [(body.sequence, len(body.nodes)) for body in said(commands)] == [(8, 1), (9, 1)]


def test_passes_over_prompts_and_over_leaves_take_turns() -> None:
    told = Told(prefill_chunk=3)
    assert evaluated(told.order(4)) == [7]
    told.begin(SECOND, (10, 11, 12, 13))
    seen = [evaluated(told.computed([(1, 0.9)]))]
    seen += [evaluated(told.computed())]
    seen += [evaluated(told.computed([(2, 0.9)]))]
    seen += [evaluated(told.computed([(20, 0.9)]))]
    assert seen == [[10, 11, 12], [1], [13], [2]]


# Slots.


def test_a_prompt_without_slots_is_not_read_and_nothing_else_breaks() -> None:
    told = Told(slots=8, max_ahead=0)
    assert told.begin(SECOND, tuple(range(6))) == [], "of eight slots three are in use"
    assert nodes(told.order(3, sequence=SECOND)) == [([], True)]
    assert told.accept(6, 5, sequence=SECOND) == []
    assert nodes(told.order(3, restart=True, sequence=SECOND)) == [([], True)]
    assert evaluated(told.order(1)) == [7], "the first one goes on"
    assert nodes(told.computed([(1, 0.9)])) == [([(1, 0x80000003)], True)]
    told.say(Close(SECOND))
    told.drafter._allocator.check()


def test_a_prompt_that_finds_no_slot_half_way_gives_back_those_that_it_has() -> None:
    told = Told(slots=8, max_ahead=0, prefill_chunk=4)
    free = told.drafter._allocator.free_slots()
    assert len(evaluated(told.begin(SECOND, tuple(range(6))))) == 4
    commands = told.computed()
    while [command for command in commands if isinstance(command, Compute)]:
        commands = told.computed()
    assert told.drafter._allocator.free_slots() == free
    assert told.drafter._allocator.length(SECOND) == 0
    told.order(1)
    assert sum(told.drafter._table.counts()[1:]) == 4, "the shard was told"


def test_an_accepted_token_without_a_slot_makes_its_sequence_mute() -> None:
    told = Told(slots=6, max_ahead=0)  # and 2 for guesses
    told.begin(SECOND, (8, 9))
    told.order(1)
    told.order(1, sequence=SECOND)
    told.computed([(5, 0.9)])
    told.computed([(1, 0.9)], [(2, 0.9)])  # 4 and 2 canonical slots
    told.accept(1, 11)
    told.accept(21, 22, 23, sequence=SECOND)
    assert nodes(told.order(1, sequence=SECOND)) == [([], True)], "three of two slots"
    assert evaluated(told.order(1)) == [1, 11]
    assert nodes(told.computed([(12, 0.9)]))[0][1]
    told.drafter._allocator.check()
    assert sum(told.drafter._table.counts()[1:]) == 6
    told.accept(24, sequence=SECOND)
    told.accept(12)
    assert evaluated(told.order(1)) == [12]


def test_guesses_without_slots_wait_and_the_order_is_answered() -> None:
    told = both(max_ahead=3, max_num_seqs=1)
    assert told.drafter._allocator.speculative == 4
    told.order(9)
    commands, passes = told.order(9, sequence=SECOND), 0
    while compute_rows(told):
        commands, passes = told.computed(*[[(50 + passes, 0.9)]] * len(compute_rows(told))), passes + 1
    assert told.drafter._allocator.room() == 0
    assert {body.sequence for body in said(commands) if body.ends_order} == {FIRST, SECOND}
    told.accept(50)
    assert evaluated(told.order(1)), "a slot of a guess became one of the text"


def compute_rows(told: Told) -> list[int]:
    """The rows of the pass under way after which choices are wanted."""
    return [row for part in told.drafter._pass.parts for row in part.wanted] if told.drafter._pass else []


@pytest.mark.parametrize(("count", "slots"), [(1, 0), (3, 0), (3, 100), (3, 1000), (64, 0)])
def test_the_shard_has_the_slots_that_the_drafter_hands_out(count: int, slots: int) -> None:
    policy = Policy("test", max_ahead=200, draft_batch=8)
    drafter = Drafter(0x8000, policy, CONTEXT, max_num_seqs=count, slots=slots)
    accepted = min(count * CONTEXT, slots or count * CONTEXT)
    assert drafter._allocator.capacity == draft_slots(policy, CONTEXT, count, slots)
    assert drafter._allocator.capacity - drafter._allocator.speculative == accepted
    assert drafter._allocator.speculative == min(count * 208, MOST_GUESSES)
    assert draft_slots(policy, CONTEXT) == CONTEXT + 208


# Which leaves.


def offer(certain: int, *probabilities: float, passed_over: int = 0) -> Offer:
    sequence, tree = DraftSequence(1, GREEDY, 1), Tree(0, 0, 99)
    sequence.passed_over = passed_over
    useful = [1.0] * certain + [*probabilities]
    return Offer(sequence, [tree.root] * len(useful), useful, certain)


def curve(*seconds: float) -> CostCurve:
    """A pass of so many rows takes so long."""
    return CostCurve(tuple(enumerate(seconds, 1)))


def test_the_most_probable_guesses_of_all_sequences_go() -> None:
    offers = [offer(1, 0.5, 0.2), offer(0, 0.9, 0.4, 0.1), offer(2)]
    assert best_counts(offers, None, 99) == [3, 3, 2]
    assert best_counts(offers, None, 3) == [2, 2, 2]
    assert best_counts(offers, None, 0) == [1, 0, 2]


def test_rows_that_cost_much_are_for_accepted_tokens_only() -> None:
    dear = curve(*[float(rows) for rows in range(1, 9)])
    offers = [offer(1, 0.5, 0.2), offer(0, 0.9, 0.4, 0.1), offer(2)]
    assert best_counts(offers, dear, 99) == [1, 0, 2]
    cheap = curve(*[1.0 + 0.15 * rows for rows in range(1, 9)])
    assert best_counts(offers, cheap, 99) == [2, 2, 2], "3.9 + 0.5 + 0.4 useful rows"


def test_a_sequence_that_is_passed_over_has_its_turn_in_the_end() -> None:
    dear = curve(*[float(rows) for rows in range(1, 9)])
    assert best_counts([offer(1), offer(0, 0.3, passed_over=PATIENCE - 1)], dear, 99) == [1, 0]
    assert best_counts([offer(1), offer(0, 0.3, 0.2, passed_over=PATIENCE)], dear, 99) == [1, 1]
    assert best_counts([offer(1), offer(0, 0.3, passed_over=PATIENCE)], dear, 0) == [1, 0], "there is no slot"


def test_of_equally_probable_guesses_those_of_the_sequence_that_waited_longest_go() -> None:
    assert best_counts([offer(0, 0.5, 0.4), offer(0, 0.5, 0.4), offer(0, 0.5)], None, 2) == [1, 1, 0]
    allocator, trees = SlotAllocator(8, 1), [Tree(0, 0, 99) for _ in range(3)]
    sequences = [DraftSequence(name, GREEDY, 1, tree=tree) for name, tree in enumerate(trees)]
    for tree in trees:
        tree.take(tree.root)
        for token in range(9):
            tree.add(tree.root, token, -0.5)
    served = []
    for number in range(1, 7):
        offers = []
        for sequence, tree in zip(sequences, trees, strict=True):
            node = tree.best()
            assert node is not None
            tree.take(node)
            offers.append(Offer(sequence, [node], [tree.probability(node)], 0))
        chosen, done = choose(offers, allocator, None, number)
        assert not done
        served += [sequence.id for sequence, _ in chosen]
    assert served == [0, 1, 2, 0, 1, 2], "there is one slot for guesses"


def test_a_pass_has_at_most_so_many_rows() -> None:
    offers = [offer(600, 0.9, 0.9), offer(420, 0.8, 0.8, 0.7)]
    assert sum(best_counts(offers, None, 99)) == MAX_ROWS
    allocator, late = SlotAllocator(5000, 10), offer(600)
    tree = late.sequence.tree = Tree(0, 0, 9)
    tree.take(tree.root)
    late.nodes = [tree.root]
    late.sequence.served = 3
    early = offer(500, 0.9)
    early.sequence.tree = Tree(0, 0, 9)
    chosen, done = choose([late, early], allocator, None, 4)
    assert [(sequence, len(nodes)) for sequence, nodes in chosen] == [(early.sequence, 501)]
    assert (done, tree.best(), late.sequence.is_mute) == ([], tree.root, False), "it has the next pass"
