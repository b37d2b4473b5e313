"""A run waits for the pass under way in the draft exactly where that was worked out to pay, and never for long."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from speculation.schedules.continuous import Continuous
from speculation.schedules.cost_curve import CostCurve
from speculation.schedules.launch_delay import GRACE, LaunchDelay, Offer
from speculation.schedules.policy import CONTINUOUS
from speculation.schedules.schedule import Launch, Order, Situation, Wait
from speculation.trees.tree import Node, Tree

PASS_S = 0.1
GUESSED = 0.8


def flat(stage_s: float) -> CostCurve:
    """Any number of rows takes as long."""
    curve = CostCurve()
    for rows in (1, 2, 4, 8, 16, 32):
        curve.observe(rows, stage_s)
    return curve


def surprised(delay: LaunchDelay, tree: Tree, now: float) -> None:
    """The target says what nobody guessed."""
    tree.take(tree.root)
    tree.advance(99)
    delay.accepted(5)  # four of five tokens had been guessed
    delay.look(tree, now)


def hang(tree: Tree, parent: Node, probability: float = GUESSED) -> Node:
    child = tree.add(parent, 0, math.log(probability))
    assert child is not None
    return child


def path(tree: Tree) -> list[Node]:
    """The root and what is below it, one child each."""
    found = [tree.root]
    while found[-1].children:
        found += found[-1].children.values()
    return found


def wants(delay: LaunchDelay, tree: Tree, stage_s: float, now: float, rows: int = 32) -> bool:
    return delay.instead(Offer(tree, path(tree), flat(stage_s), rows, 8, now)) is not None


def taught() -> tuple[LaunchDelay, Tree]:
    """A launch delay that has seen two hundred corrections, each with a level of drafts 0.1 s later."""
    delay, tree = LaunchDelay(), Tree(0, 0, 1000)
    for number in range(200):
        surprised(delay, tree, float(number))
        wants(delay, tree, 1.0, float(number))
        hang(tree, tree.root)
        delay.look(tree, number + PASS_S)
    surprised(delay, tree, 1000.0)
    return delay, tree


@pytest.mark.parametrize("stage_s", [0.05, 0.3, 0.5, 1.0, 2.0, 5.0])
def test_the_levels_a_new_root_waits_for_are_those_of_least_expected_delay(stage_s: float) -> None:
    delay, tree = taught()

    def expected(levels: int) -> float:
        return levels * PASS_S + stage_s * GUESSED ** (levels + 1) / (1 - GUESSED ** (stage_s / PASS_S))

    best = min(range(16), key=expected) if stage_s > PASS_S else 0
    waited, now = 0, 1000.0
    while wants(delay, tree, stage_s, now):
        waited, now = waited + 1, now + PASS_S
        hang(tree, path(tree)[-1])
        delay.look(tree, now)
    assert abs(waited - best) <= 1, (waited, best)  # 0.1 s are not exactly that
    assert abs(expected(waited) - expected(best)) < 0.02 * expected(best)


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_a_run_waits_for_the_pass_under_way_where_the_delays_of_all_that_follows_are_less(passes: int) -> None:
    """The world of the formula, written out: passes every 0.1 s, each worth 0.8 of the one before, a run every so many
    of them."""
    rng, stage_s = random.Random(passes), passes * PASS_S
    said = []
    for _ in range(50):
        wait_s, first, here = rng.uniform(0.01, 0.95) * PASS_S, rng.uniform(0.1, 0.9), rng.uniform(2.0, 12.0)

        def late(leaves_at: float, first: float = first, wait_s: float = wait_s) -> float:
            """The delays of all that later passes find, if a run leaves then and every stage time after."""
            total = 0.0
            for index in range(200):
                ready = wait_s + index * PASS_S
                runs = max(0, math.ceil((ready - leaves_at) / stage_s - 1e-9))
                total += first * GUESSED**index * (leaves_at + runs * stage_s)
            return total

        gain = late(0.0) - (late(wait_s) + here * wait_s)
        if abs(gain) < 1e-6:
            continue  # a tie
        delay, tree = LaunchDelay(), Tree(0, 0, 100)
        delay.look(tree, 0.0)
        hang(tree, tree.root)
        delay.look(tree, PASS_S)  # a pass took that long, and the next is under way
        expected = here + first / (1 - GUESSED)
        delay._tokens, delay._surprises = expected, 1.0
        leaf, other = (Node(token, tree.root, 0.0, 1) for token in (1, 2))
        other.children = {0: leaf}  # the draft has been there
        leaf.logp = math.log(first / (1 - 1 / expected))
        other.logp = math.log(here - math.exp(leaf.logp))
        says = delay.instead(Offer(tree, [other, leaf], flat(stage_s), 32, 8, 2 * PASS_S - wait_s)) is not None
        assert says == (gain > 0), (wait_s, first, here, gain)
        said.append(says)
    assert 5 < sum(said) < len(said) - 5 > 30


def test_it_waits_no_longer_than_promised_and_learns_from_silence() -> None:
    delay, tree = taught()
    assert wants(delay, tree, 1.0, 1000.0)
    assert abs(delay._until - (1000.0 + GRACE * PASS_S)) < 0.01
    assert not wants(delay, tree, 1.0, delay._until)
    waited = []
    for number in range(20):  # the drafter has fallen silent
        began = now = 2000.0 + 10 * number
        surprised(delay, tree, now)
        while wants(delay, tree, 1.0, now):
            now = delay._until
        waited.append(now - began)
    assert waited[0] > PASS_S
    assert waited[-1] == 0.0, "it has given up waiting"


def test_where_rows_are_dear_it_waits_less() -> None:
    """A run of two that takes twice as long as one of one saves nothing."""
    delay, tree = taught()
    assert delay.instead(Offer(tree, path(tree), flat(1.0), 32, 8, 1000.0))
    dear = CostCurve()
    for rows in (1, 2, 4):
        dear.observe(rows, 1.0 * rows)
    assert not delay.instead(Offer(tree, path(tree), dear, 32, 8, 1000.0))


def test_without_experience_or_without_a_gain_it_goes_at_once() -> None:
    delay, tree = LaunchDelay(), Tree(0, 0, 10)
    surprised(delay, tree, 0.0)
    assert wants(delay, tree, 1.0, 0.0), "it knows nothing yet and tries"
    assert delay._until == 0.5
    assert not wants(delay, tree, 1.0, delay._until)
    delay, tree = taught()
    assert not wants(delay, tree, PASS_S / 2, 1000.0), "drafts are slower than stages"
    assert not wants(delay, tree, 1.0, 1000.0, rows=1), "runs of one row"
    assert not delay.instead(Offer(tree, path(tree), CostCurve(), 32, 8, 1000.0)), "nobody knows what a run costs"


def test_it_waits_even_if_nobody_had_time_to_guess_so_far() -> None:
    """Where drafts are only made while a root is held, a root that is never held could never be guessed."""
    delay, tree = LaunchDelay(), Tree(0, 0, 100)
    for number in range(60):
        tree.take(tree.root)
        tree.advance(99)
        delay.accepted(1)
        delay.look(tree, float(number))
        if wants(delay, tree, 1.0, float(number)):
            hang(tree, tree.root)
            delay.look(tree, number + PASS_S)
        tree.prune()  # not in time
        delay.look(tree, number + 0.5)
    assert wants(delay, tree, 1.0, 59.0)


def test_the_schedule_asks_to_be_woken_once_and_then_sends_the_root() -> None:
    """Who is woken in vain, the request being over, asks for nothing more: else it would be woken for ever."""
    schedule, tree = Continuous(CONTINUOUS), Tree(0, 0, 100)
    schedule.opened(tree)
    now = Situation([tree], credits=1, in_flight=0, slots=4, room=8, now=10.0)
    assert isinstance(schedule.next(now), Order)
    schedule.returned(1, 1.0, 8.0, carries_root=True)
    assert schedule.next(now) == Wait(10.5)
    assert [schedule.next(now) for _ in range(3)] == [None] * 3
    launch = schedule.next(replace(now, now=10.5))
    assert isinstance(launch, Launch)
    assert launch.nodes == [tree.root]


def test_a_run_that_is_held_leaves_with_the_drafts_it_was_held_for() -> None:
    schedule, tree = Continuous(CONTINUOUS), Tree(0, 0, 100)
    schedule.opened(tree)
    now = Situation([tree], credits=1, in_flight=0, slots=4, room=8, now=10.0)
    schedule.next(now)
    schedule.returned(1, 1.0, 8.0, carries_root=True)
    assert schedule.next(now) == Wait(10.5)
    child = hang(tree, tree.root)
    launch = schedule.next(replace(now, now=10.45))
    assert isinstance(launch, Launch), "the pass took nearly half a stage time: another does not pay"
    assert launch.nodes == [tree.root, child]
