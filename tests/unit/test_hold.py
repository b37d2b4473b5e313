"""A new root waits for drafts exactly where that was worked out to pay, and never for long."""

from __future__ import annotations

from dataclasses import replace

from speculation.continuous import Continuous
from speculation.hold import GRACE, Hold
from speculation.policy import CONTINUOUS
from speculation.schedule import Launch, Order, Situation, Wait
from speculation.tree import Tree

LEVEL_S = 0.1


def surprised(hold: Hold, tree: Tree, now: float) -> None:
    """The target says what nobody guessed."""
    tree.take(tree.root)
    tree.advance(99)
    hold.accepted(5)  # four of five tokens had been guessed
    hold.look(tree, now)


def drafted(tree: Tree, levels: int) -> None:
    node = tree.root
    for token in range(levels):
        child = tree.add(node, token, -0.1)
        assert child is not None
        node = child


def taught() -> tuple[Hold, Tree]:
    """A hold that has seen twenty surprises, each with a level of drafts 0.1 s later."""
    hold, tree = Hold(), Tree(0, 0, 1000)
    for turn in range(20):
        surprised(hold, tree, float(turn))
        hold.wants(1.0, 7, float(turn))
        drafted(tree, 1)
        hold.look(tree, turn + LEVEL_S)
    surprised(hold, tree, 100.0)
    return hold, tree


def test_the_levels_waited_for_are_those_of_least_expected_delay() -> None:
    for stage_s in (0.05, 0.3, 0.5, 1.0, 2.0, 5.0):
        hold, tree = taught()

        def delay(levels: int, n: float = stage_s / LEVEL_S, t: float = stage_s) -> float:
            return levels * LEVEL_S + t * 0.8 ** (levels + 1) / (1 - 0.8**n)

        best = min(range(16), key=delay) if stage_s > LEVEL_S else 0
        waited = 0
        while hold.wants(stage_s, 15, 100.0):
            waited += 1
            drafted(tree, waited)
        assert abs(waited - best) <= 1, (stage_s, waited, best)  # what was seen is not four of five exactly
        assert abs(delay(waited) - delay(best)) < 0.02 * delay(best)


def test_it_waits_no_longer_than_promised_and_learns_from_silence() -> None:
    hold, _ = taught()
    assert hold.wants(1.0, 2, 100.0)
    assert abs(hold.until - (100.0 + GRACE * 2 * LEVEL_S)) < 0.01
    assert not hold.wants(1.0, 2, hold.until)
    hold, tree = taught()
    waited = []
    for turn in range(20):  # the drafter has fallen silent
        began = now = 200.0 + 10 * turn
        surprised(hold, tree, now)
        while hold.wants(1.0, 7, now):
            now = hold.until
        waited.append(now - began)
    assert waited[0] > 0.3
    assert waited[-1] == 0.0, "it has given up waiting"


def test_without_experience_or_without_a_gain_it_goes_at_once() -> None:
    hold, tree = Hold(), Tree(0, 0, 10)
    surprised(hold, tree, 0.0)
    assert hold.wants(1.0, 7, 0.0), "it knows nothing yet and tries"
    assert not hold.wants(1.0, 7, hold.until)
    assert hold.until == 0.5
    hold, _ = taught()
    assert not hold.wants(LEVEL_S, 7, 100.0), "drafts are as slow as stages"
    assert not hold.wants(1.0, 0, 100.0), "runs of one row"


def test_it_waits_even_if_nobody_had_time_to_guess_so_far() -> None:
    """Where drafts are only made while a root is held, a root that is never held could never be guessed."""
    hold, tree = Hold(), Tree(0, 0, 100)
    for turn in range(60):
        tree.take(tree.root)
        tree.advance(99)
        hold.accepted(1)
        hold.look(tree, float(turn))
        if hold.wants(1.0, 7, float(turn)):
            drafted(tree, 1)
            hold.look(tree, turn + LEVEL_S)
        tree.prune()  # not in time
        hold.look(tree, turn + 0.5)
    assert hold.wants(1.0, 7, 59.0)


def test_the_schedule_asks_to_be_woken_once_and_then_sends_the_root() -> None:
    """Who is woken in vain, the request being over, asks for nothing more: else it would be woken for ever."""
    schedule, tree = Continuous(CONTINUOUS), Tree(0, 0, 100)
    schedule.opened()
    now = Situation(tree, credits=1, in_flight=0, slots=4, room=8, now=10.0)
    assert isinstance(schedule.next(now), Order)
    schedule.returned(1, 1.0, 8.0, carries_root=True)
    assert schedule.next(now) == Wait(10.5)
    assert [schedule.next(now) for _ in range(3)] == [None] * 3
    launch = schedule.next(replace(now, now=10.5))
    assert isinstance(launch, Launch)
    assert launch.nodes == [tree.root]
