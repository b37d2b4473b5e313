"""Schedules that decide for several sequences: which trees a run is made of, and whose drafts are ordered."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from speculation.schedules.continuous import Continuous
from speculation.schedules.cost_curve import Priors
from speculation.schedules.pipeinfer import PipeInfer
from speculation.schedules.policy import CONTINUOUS, PLAIN, Policy
from speculation.schedules.rounds import Rounds
from speculation.schedules.schedule import ANY, UNLIMITED, Launch, Order, Schedule, Situation, Step
from speculation.trees.tree import Tree

COSTLY = ((1, 1.0), (8, 1.7), (32, 4.0))
GREEDY = Policy("greedy", max_rows=4, topk=2, max_ahead=8)


def trees_of(schedule: Schedule, count: int, first: int = 1) -> list[Tree]:
    """The trees of sequences that begin, their roots known and unsent."""
    trees = [Tree(0, 4, 100, sequence) for sequence in range(first, first + count)]
    for tree in trees:
        schedule.opened(tree)
    return trees


def now(trees: list[Tree], **more: Any) -> Situation:
    return Situation(trees, **{"credits": 1, "in_flight": 0, "slots": 4, "room": 9} | more)


def sent(step: Step | None) -> list[tuple[int, int]]:
    """The sequence and position of each node."""
    assert isinstance(step, Launch)
    return [(node.sequence, node.position) for node in step.nodes]


def test_who_decodes_how_many() -> None:
    assert Continuous(PLAIN).most_sequences == Rounds(GREEDY).most_sequences == ANY
    assert PipeInfer(GREEDY).most_sequences == 1


@pytest.mark.parametrize(("count", "stages", "roots"), [(2, 1, 2), (5, 2, 3), (4, 2, 2), (3, 8, 1)])
def test_known_tokens_of_a_run(count: int, stages: int, roots: int) -> None:
    schedule = Continuous(PLAIN, stages=stages)
    trees = trees_of(schedule, count)
    seen = []
    while (step := schedule.next(now(trees))) is not None:
        seen.append(len(sent(step)))
    assert seen[0] == roots
    assert sum(seen) == count
    assert max(seen) <= roots


def test_known_tokens_are_as_many_as_there_are_slots() -> None:
    schedule = Continuous(PLAIN)
    trees = trees_of(schedule, 3)
    assert sent(schedule.next(now(trees, room=0, root_room=2))) == [(1, 4), (2, 4)]
    assert schedule.next(now(trees, room=0, root_room=0)) is None


def test_who_waited_longest_goes_first() -> None:
    schedule = Continuous(PLAIN, stages=3)
    trees = trees_of(schedule, 3)
    order = []
    for _ in range(9):
        ((sequence, _),) = sent(schedule.next(now(trees)))
        order.append(sequence)
        trees[sequence - 1].advance(1)
    assert order == [1, 2, 3] * 3


def test_guesses_of_all_trees_fill_the_run_best_first() -> None:
    schedule = Continuous(GREEDY)
    trees = trees_of(schedule, 2)
    for tree, logp in zip(trees, (-0.5, -0.1), strict=True):
        node = tree.add(tree.root, 1, logp)
        assert node is not None
        tree.add(node, 2, logp)
    assert sent(schedule.next(now(trees))) == [(1, 4), (2, 4), (2, 5), (2, 6)]
    assert sent(schedule.next(now(trees, room=1))) == [(1, 5)]


@pytest.mark.parametrize("busy", [{"credits": 0}, {"slots": 0}], ids=str)
def test_nothing_leaves_without_a_credit_and_a_place_in_flight(busy: dict[str, int]) -> None:
    for schedule in (Continuous(PLAIN), Continuous(GREEDY)):
        trees = trees_of(schedule, 2)
        assert schedule.next(now(trees, **busy)) is None
        assert len(sent(schedule.next(now(trees)))) == 2


def test_where_rows_are_dear_known_tokens_leave_alone() -> None:
    schedule = Continuous(CONTINUOUS)
    trees = trees_of(schedule, 2)
    for tree in trees:
        tree.add(tree.root, 1, math.log(0.4))
        order = schedule.next(now(trees))
        assert order == Order(UNLIMITED, draft_batch=CONTINUOUS.draft_batch, sequence=tree.sequence, shared=True)
    for rows in (1, 2, 3, 4, 8, 16, 32):
        schedule.returned(rows, 1.0 * rows, 8.0, carries_root=True)
    assert sent(schedule.next(now(trees))) == [(1, 4), (2, 4)]
    assert all(child.pending for tree in trees for child in tree.root.children.values()), "they are given back"


def test_each_sequence_is_drafted_for_once_it_is_one_of_several() -> None:
    schedule = Continuous(CONTINUOUS)
    standing = Order(UNLIMITED, draft_batch=CONTINUOUS.draft_batch, shared=True)
    (first,) = trees_of(schedule, 1)
    assert isinstance(schedule.next(now([first])), Order)
    (second,) = trees_of(schedule, 1, first=2)
    for tree in (first, second):
        assert schedule.next(now([first, second])) == replace(standing, sequence=tree.sequence)
    assert isinstance(schedule.next(now([first, second])), Launch)


def test_what_was_ordered_for_one_that_was_alone_is_no_order_of_several() -> None:
    schedule = Continuous(CONTINUOUS)
    first, second = trees_of(schedule, 2)
    while isinstance(schedule.next(now([first, second])), Order):
        pass
    schedule.closed(second)
    assert isinstance(schedule.next(now([first])), Order), "the governor's, for whom it is alone"
    (third,) = trees_of(schedule, 1, first=3)
    ordered = []
    while isinstance(step := schedule.next(now([first, third])), Order):
        ordered.append(step.sequence)
    assert ordered == [1, 3]


def test_on_one_rank_all_are_drafted_for_before_a_run() -> None:
    schedule = Continuous(CONTINUOUS, "alone")
    trees = trees_of(schedule, 2)
    schedule.returned(1, 1.0, 1.0, carries_root=True)
    one = Order(1, draft_batch=CONTINUOUS.draft_batch)
    orders = [schedule.next(now(trees)) for _ in range(4)]
    assert orders[:2] == [Order(0, sequence=1), Order(0, sequence=2)]
    assert orders[2:] == [replace(one, sequence=2), replace(one, sequence=1)]
    schedule.drafted(trees[0], [])
    assert schedule.next(now(trees)) is None, "sequence 2 is not done"
    schedule.closed(trees[1])
    (third,) = trees_of(schedule, 1, first=3)
    assert schedule.next(now([trees[0], third])) == Order(0, sequence=3)
    assert isinstance(schedule.next(now([trees[0], third])), Launch), "the draft proposed nothing"


def test_on_one_rank_the_draft_makes_passes_while_they_pay() -> None:
    schedule = Continuous(CONTINUOUS, "alone", Priors(COSTLY, COSTLY, ((1, 0.1), (8, 0.1))))
    trees = trees_of(schedule, 2)
    for level in range(3):
        while isinstance(schedule.next(now(trees, now=0.1 * level)), Order):
            pass
        for tree in trees:
            leaf = tree.root
            while leaf.children:
                (leaf,) = leaf.children.values()
            leaf.is_drafted = True
            tree.add(leaf, 1, math.log(0.9))
        for tree in trees:
            schedule.drafted(tree, [])
    while not isinstance(step := schedule.next(now(trees, now=1e6)), Launch):
        assert isinstance(step, Order), "after so long a pass costs nothing, and still it adds little"
        for tree in trees:
            schedule.drafted(tree, [])
    assert len(step.nodes) == 8, "two roots with three levels each"


# Synchronous speculation.


def rounds(count: int, stages: int = 1) -> tuple[Rounds, list[Tree]]:
    """All have been drafted for and are ready."""
    schedule = Rounds(replace(GREEDY, schedule="rounds", num_steps=3), stages)
    trees = trees_of(schedule, count)
    for tree in trees:
        schedule.accepted(tree, 1, 0.0)
    for tree in trees:
        assert schedule.next(now(trees)) == Order(3, restart=True, sequence=tree.sequence)
    assert schedule.next(now(trees)) is None
    for tree in trees:
        schedule.drafted(tree, [])
    return schedule, trees


def test_rounds_that_are_ready_together_share_a_run() -> None:
    schedule, trees = rounds(2)
    trees[1].add(trees[1].root, 1, -0.1)
    assert sent(schedule.next(now(trees))) == [(1, 4), (2, 4), (2, 5)]
    assert schedule.next(now(trees)) is None


def test_rounds_spread_over_the_stages() -> None:
    schedule, trees = rounds(3, stages=2)
    assert [sent(schedule.next(now(trees))) for _ in range(2)] == [[(1, 4), (2, 4)], [(3, 4)]]


def test_guesses_of_all_rounds_share_the_slots() -> None:
    schedule, trees = rounds(2)
    for tree in trees:
        for token in range(3):
            tree.add(tree.root, token, -0.1)
    assert sent(schedule.next(now(trees, room=4))) == [(1, 4), (1, 5), (1, 5), (1, 5), (2, 4), (2, 5)]


def test_a_round_does_not_wait_for_others() -> None:
    schedule, trees = rounds(2)
    schedule.accepted(trees[0], 1, 0.0)
    assert schedule.next(now(trees)) == Order(3, restart=True, sequence=1)
    assert sent(schedule.next(now(trees))) == [(2, 4)]


def test_a_sequence_that_is_over_is_forgotten() -> None:
    schedule, trees = rounds(2)
    schedule.closed(trees[0])
    schedule.drafted(trees[0], [])
    assert sent(schedule.next(now(trees[1:]))) == [(2, 4)]


def test_from_so_many_requests_on_rounds_have_no_drafts() -> None:
    schedule = Rounds(replace(GREEDY, schedule="rounds", num_steps=3, speculate_below=2))
    trees = trees_of(schedule, 2)
    for tree in trees:
        schedule.accepted(tree, 1, 0.0)
    assert sent(schedule.next(now(trees))) == [(1, 4), (2, 4)]
    schedule.closed(trees[1])
    schedule.accepted(trees[0], 1, 0.0)
    assert schedule.next(now(trees[:1])) == Order(3, restart=True, sequence=1)


def test_a_run_of_rounds_verifies_the_most_probable_drafts_of_all() -> None:
    schedule = Rounds(replace(GREEDY, schedule="rounds", most_drafted=2))
    trees = trees_of(schedule, 2)
    for tree, logp in zip(trees, (-0.1, -0.5), strict=True):
        schedule.accepted(tree, 1, 0.0)
        schedule.next(now(trees))
        schedule.drafted(tree, [])
        for token in range(2):
            tree.add(tree.root, token, logp)
    assert sent(schedule.next(now(trees))) == [(1, 4), (2, 4), (1, 5), (1, 5)]


def test_without_balance_all_known_tokens_share_a_run() -> None:
    schedule = Continuous(replace(PLAIN, balance=False), stages=3)
    assert sent(schedule.next(now(trees_of(schedule, 3)))) == [(1, 4), (2, 4), (3, 4)]
