"""Cohorts of many sequences: how many roots and levels they have, who is drafted for, and when they are the way."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from speculation.schedules.cohorts import LATE, Orders, Plan, plan
from speculation.schedules.continuous import Continuous
from speculation.schedules.cost_curve import CostCurve, Costs, Priors
from speculation.schedules.many import Many
from speculation.schedules.policy import CONTINUOUS
from speculation.schedules.schedule import UNLIMITED, Launch, Order, Situation, Step, Wait
from speculation.schedules.trial import PATIENCE, SETTLES, STAKE, Trial
from speculation.trees.tree import Node, Tree

CPU: Costs = ((1, 57.0), (2, 73.0), (4, 94.0), (8, 120.0), (16, 206.0), (32, 348.0))
DRAFTS: Costs = tuple((rows, seconds / 2) for rows, seconds in CPU)
STANDING = Order(UNLIMITED, draft_batch=CONTINUOUS.draft_batch, shared=True)


def best(sequences: int, stages: int, right: float = 0.79, costs: Costs = CPU, guesses: int = 32) -> Plan:
    return plan(sequences, stages, right, guesses, CostCurve(costs).seconds, CostCurve(DRAFTS).seconds)


@pytest.mark.parametrize(
    ("sequences", "stages", "roots", "levels"),
    [(4, 4, 1, 4), (8, 8, 1, 4), (16, 8, 2, 3), (16, 4, 3, 2), (64, 8, 7, 1), (32, 4, 8, 0), (64, 4, 16, 0)],
)
def test_the_best_cohorts(sequences: int, stages: int, roots: int, levels: int) -> None:
    assert best(sequences, stages)[1:3] == (roots, levels)


def test_cohorts_earn_no_less_than_plain_decoding() -> None:
    for sequences in range(1, 40):
        plain = sequences / (4 * CostCurve(CPU).seconds(-(-sequences // 4)))
        assert best(sequences, 4, right=0.01).rate >= 0.999 * plain
        assert best(sequences, 4, guesses=0).levels == 0


def test_a_run_has_no_more_guesses_than_it_may() -> None:
    flat = ((1, 57.0), (32, 57.0))
    assert best(8, 2, right=0.99, costs=flat, guesses=6)[1:3] == (4, 1)


def trees_of(count: int) -> list[Tree]:
    return [Tree(0, 4, 1000, sequence) for sequence in range(count)]


def test_levels_are_ordered_for_one_cohort_after_the_other() -> None:
    orders, trees, pairs = Orders(8), trees_of(4), Plan(1.0, 2, 3, 5.0)
    asked = [orders.of_levels(trees, pairs, 0.0) for _ in range(3)]
    assert asked == [Order(3, draft_batch=1, sequence=0), Order(3, draft_batch=1, sequence=1), None]
    orders.drafted(0)
    assert orders.ready_at(trees[0], 3, 1.0) == 1.0
    assert orders.ready_at(trees[1], 3, 1.0) == LATE * 5.0
    assert orders.ready_at(trees[2], 3, 1.0) == math.inf, "nothing is ordered for it yet"
    assert orders.of_levels(trees, pairs, 1.0) == Order(3, draft_batch=1, sequence=2)
    late = LATE * 5.0 + 1.0
    assert orders.of_levels(trees, pairs, late) == Order(3, draft_batch=1, sequence=3), "who is late holds up nobody"


def test_an_order_is_answered_before_the_next_one() -> None:
    orders, trees, single = Orders(8), trees_of(1), Plan(1.0, 1, 3, 5.0)
    assert orders.of_levels(trees, single, 0.0) == Order(3, draft_batch=1, sequence=0)
    trees[0].advance(1)
    assert orders.of_levels(trees, single, 99.0) is None
    assert orders.without_end(trees) is None
    assert orders.is_awaited
    orders.drafted(0)
    assert orders.without_end(trees) == Order(UNLIMITED, draft_batch=8, sequence=0, shared=True)
    assert not orders.is_awaited


def test_who_is_in_flight_is_drafted_for_no_more() -> None:
    orders, trees = Orders(8), trees_of(2)
    while orders.without_end(trees):
        pass
    trees[0].take(trees[0].root)
    asked = [orders.of_levels(trees, Plan(1.0, 1, 2, 5.0), 0.0) for _ in range(3)]
    assert asked == [Order(0, sequence=0), Order(2, draft_batch=1, sequence=1), None]


def test_a_root_that_left_without_its_levels_is_not_drafted_for() -> None:
    orders, trees, single = Orders(8), trees_of(2), Plan(1.0, 1, 2, 5.0)
    orders.of_levels(trees, single, 0.0)
    trees[1].take(trees[1].root)
    orders.drafted(0)
    assert orders.of_levels(trees, single, 1.0) == Order(0, sequence=1)
    assert orders.of_levels(trees, single, 1.0) is None


def spell(trial: Trial, ratio: float, sequences: int = 8, now: float = 0.0) -> float:
    """One spell in which ``ratio`` times as much leaves as cohorts would earn. Returns when it ends; it begins at
    ``now``."""
    trial.look(sequences, 0.0, now)
    before = -1.0
    while trial._expected >= before:
        trial.launched(sequences, float(sequences))
        now, before = now + 1.0, trial._expected
        trial.look(sequences, sequences / ratio, now)
    return now


def test_cohorts_are_tried_where_running_ahead_earns_less() -> None:
    trial, now = Trial(), 0.0
    for ratio in (1.2, 1.05, 1.3):
        now = spell(trial, ratio, now=now)
        assert not trial.in_cohorts
    now = spell(trial, 0.9, now=now)
    assert trial.in_cohorts
    now = spell(trial, 0.8, now=now)
    assert not trial.in_cohorts, "they earn even less"
    spell(trial, 0.95, now=now)
    assert not trial.in_cohorts


def test_the_other_way_is_tried_again_ever_more_rarely() -> None:
    trial, now, changes = Trial(), 0.0, list[int]()
    for number in range(80):
        before = trial.in_cohorts
        now = spell(trial, 0.98 if before else 0.9, now=now)
        if trial.in_cohorts and not before:
            changes.append(number)
    spells = [later - earlier for earlier, later in pairwise(changes)]
    assert spells[:3] == sorted(spells[:3])
    assert spells[0] >= PATIENCE
    assert spells[1] > spells[0]


def test_a_trial_that_loses_ends_early() -> None:
    trial = Trial()
    now = spell(trial, 0.9)
    assert trial.in_cohorts
    trial.launched(SETTLES * 8, 0.0)
    lost = 0.0
    while trial.in_cohorts:
        now += 0.1
        trial.look(8, 8.0, now)
        lost += 0.9 * 0.8
    assert lost <= STAKE * 8 + 2.0


def test_each_number_of_sequences_has_a_record() -> None:
    trial = Trial()
    spell(trial, 0.9, 8)
    assert trial.in_cohorts
    trial.look(3, 1.0, 1e3)
    assert not trial.in_cohorts
    trial.look(9, 1.0, 2e3)
    assert trial.in_cohorts
    trial.pause()
    assert not trial.in_cohorts


class Cohorts:
    """Sequences that are decoded in cohorts. Time stands still unless it is moved."""

    def __init__(self, count: int, stages: int) -> None:
        self.many = Many(CONTINUOUS, stages, CostCurve(CPU), DRAFTS[0][1], 0.79, CostCurve(DRAFTS))
        self.trees, self.now = trees_of(count), 0.0
        self.many._trial.look(count, 1.0, 0.0)
        self.many._trial._record.in_cohorts = True

    def step(self, **more: int) -> Step | None:
        numbers = {"credits": 1, "in_flight": 0, "slots": 9, "room": 99} | more
        now = Situation(self.trees, now=self.now, **numbers)  # type: ignore[arg-type]
        return self.many.order(now) or self.many.next(now)

    def draft(self, sequence: int, levels: int) -> None:
        tree = self.trees[sequence]
        leaf: Node | None = tree.root
        for _ in range(levels):
            assert leaf is not None
            leaf.is_drafted = True
            leaf = tree.add(leaf, 1, math.log(0.79))
        self.many.drafted(tree)


def test_a_cohort_leaves_when_its_levels_are_there() -> None:
    game = Cohorts(16, 8)
    for tree in game.trees[2:]:
        tree.take(tree.root)
    asked = []
    while isinstance(step := game.step(), Order):
        asked.append(step)
    assert [order for order in asked if order.passes] == [Order(3, draft_batch=1, sequence=one) for one in (0, 1)]
    assert isinstance(step, Wait)
    game.draft(0, 3)
    game.many.returned(120.0)
    assert isinstance(game.step(), Wait), "a run of two saves more than it costs to wait for the second one"
    game.draft(1, 3)
    step = game.step()
    assert isinstance(step, Launch)
    assert [(node.sequence, node.position) for node in step.nodes] == [
        (sequence, position) for position in (4, 5, 6, 7) for sequence in (0, 1)
    ]


def test_a_root_whose_drafts_do_not_come_leaves_without() -> None:
    game = Cohorts(8, 8)
    for tree in game.trees[1:]:
        tree.take(tree.root)
    while isinstance(step := game.step(), Order):
        pass
    assert isinstance(step, Wait)
    game.now = step.until
    step = game.step()
    assert isinstance(step, Launch)
    assert step.nodes == [game.trees[0].root]
    game.trees[0].advance(1)
    step = game.step()
    assert isinstance(step, Launch), "nothing is ordered before the answer, and so nothing is waited for"


def test_where_no_level_pays_known_tokens_leave_at_once() -> None:
    game = Cohorts(32, 4)
    sizes = []
    while (step := game.step()) is not None:
        if isinstance(step, Launch):
            sizes.append(len(step.nodes))
        else:
            assert step == Order(0, sequence=step.sequence)  # type: ignore[union-attr]
    assert sizes == [8, 8, 8, 8]


def test_one_sequence_that_is_left_gets_its_order_after_the_answer() -> None:
    schedule = Continuous(CONTINUOUS, priors=Priors(CPU, CPU, DRAFTS), stages=2)
    trees = trees_of(2)
    for tree in trees:
        schedule.opened(tree)

    def step(*living: Tree) -> Step | None:
        return schedule.next(Situation(living, credits=1, in_flight=0, slots=9, room=99))

    assert schedule._many is not None
    while isinstance(step(*trees), Order):
        pass
    schedule._many._trial._record.in_cohorts = True
    trees[0].advance(1)
    order = step(*trees)
    assert isinstance(order, Order)
    while order is None or not isinstance(order, Order) or not order.passes:
        order = step(*trees)
    assert order.sequence is not None
    left = trees[order.sequence]
    schedule.closed(trees[1 - order.sequence])
    assert not isinstance(step(left), Order)
    schedule.drafted(left, [])
    assert isinstance(step(left), Order)
