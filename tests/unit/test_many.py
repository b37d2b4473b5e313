"""Many sequences over many stages (see speculation/schedules/many.py): who leaves, who waits, with how many rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from speculation.schedules.cost_curve import CostCurve, Costs
from speculation.schedules.drafting import GRACE, Drafting
from speculation.schedules.many import Many
from speculation.schedules.policy import CONTINUOUS
from speculation.schedules.schedule import Launch, Situation, Step, Wait
from speculation.schedules.traffic import Traffic
from speculation.trees.tree import Node, Tree

CPU: Costs = ((1, 57.0), (2, 73.0), (4, 94.0), (8, 120.0), (16, 206.0), (32, 348.0))
FLAT: Costs = ((1, 57.0), (32, 57.0))
DEAR: Costs = ((1, 57.0), (2, 114.0), (32, 1824.0))
DRAFT_S = 10.0


class Game:
    """``count`` sequences over ``stages`` stages. Time stands still unless it is moved."""

    def __init__(self, count: int, stages: int, costs: Costs = CPU, draft_s: float = DRAFT_S) -> None:
        self.many = Many(CONTINUOUS, stages, CostCurve(costs), draft_s, right=0.8)
        self.trees = [Tree(0, 4, 1000, sequence) for sequence in range(count)]
        self.now = 0.0

    def step(self, **more: Any) -> Step | None:
        numbers = {"credits": 1, "in_flight": 0, "slots": 9, "room": 99, "now": self.now} | more
        return self.many.next(Situation(self.trees, **numbers))

    def grow(self, *sequences: int, share: float = 0.8) -> None:
        """The draft finds a further level of these trees."""
        for sequence in sequences:
            leaf = self.trees[sequence].root
            while leaf.children:
                (leaf,) = leaf.children.values()
            leaf.is_drafted = True
            assert self.trees[sequence].add(leaf, 1, math.log(share)) is not None

    def send(self, *sequences: int) -> None:
        """These roots are in flight."""
        for sequence in sequences:
            self.trees[sequence].take(self.trees[sequence].root)


def launched(step: Step | None) -> list[Node]:
    assert isinstance(step, Launch), step
    return step.nodes


def test_an_unsent_root_waits_for_the_level_that_is_being_drafted() -> None:
    game = Game(8, 8)
    game.send(*range(1, 8))
    step = game.step()
    assert isinstance(step, Wait)
    assert game.step() is None, "there is no second Wait before a change"
    for level in range(1, 9):
        game.now = level * DRAFT_S
        game.grow(0)
        if isinstance(step := game.step(), Launch):
            break
    nodes = launched(step)
    assert nodes[0] is game.trees[0].root
    assert 3 < len(nodes) <= level + 1, "what was drafted goes along, as far as it is worth a row"


def test_it_waits_no_longer_than_a_late_pass_may_take_and_not_again_until_it_grows() -> None:
    game = Game(8, 8)
    game.send(*range(1, 8))
    step = game.step()
    assert step == Wait((1 + GRACE) * DRAFT_S)
    game.now = step.until
    assert launched(game.step()) == [game.trees[0].root]
    game.trees[0].advance(1)
    assert launched(game.step()) == [game.trees[0].root], "nobody seems to draft for it"
    game.trees[0].advance(1)
    game.grow(0)
    assert isinstance(game.step(), Wait)


def test_where_rows_are_dear_nobody_waits_and_no_guess_leaves() -> None:
    game = Game(4, 2, DEAR)
    game.grow(0, 1, 2, 3)
    assert launched(game.step()) == [tree.root for tree in game.trees[:2]]
    assert launched(game.step()) == [tree.root for tree in game.trees[2:]]
    assert game.step() is None


@pytest.mark.parametrize(("count", "stages", "costs", "roots"), [(8, 8, CPU, 1), (64, 8, CPU, 8), (9, 8, FLAT, 2)])
def test_the_roots_of_a_run_are_a_stages_share(count: int, stages: int, costs: Costs, roots: int) -> None:
    game = Game(count, stages, costs)
    game.many = Many(CONTINUOUS, stages, CostCurve(costs))  # no pass of a draft is known: nobody waits
    assert len(launched(game.step())) == roots


def test_a_run_waits_for_no_other_roots_longer_than_the_last_run_took() -> None:
    wrong = tuple((rows, 1000.0 * seconds) for rows, seconds in CPU)
    for measured_s in (0.0, 9.0, 57.0):
        game = Game(16, 8, wrong, draft_s=0.0)
        if measured_s:
            game.many.returned(measured_s)
        game.send(*range(1, 16))
        step = game.step()
        if not measured_s:
            assert launched(step) == [game.trees[0].root]
        else:
            assert step == Wait(measured_s)


def test_who_waits_longest_goes_first() -> None:
    game = Game(3, 3)
    game.many = Many(CONTINUOUS, 3, CostCurve(CPU))
    order = []
    for _ in range(9):
        (root,) = launched(game.step())
        order.append(root.sequence)
        game.now += 57.0
        game.trees[root.sequence].advance(1)
    assert order == [0, 1, 2] * 3


def test_a_run_with_few_roots_waits_for_others_as_long_as_that_saves_time() -> None:
    game = Game(16, 8, CPU, draft_s=0.0)
    game.many.returned(57.0)
    game.send(*range(1, 16))
    step = game.step()
    assert isinstance(step, Wait)
    assert 0 < step.until <= 57.0
    assert game.trees[0].root.pending, "it was given back"
    game.now = step.until
    assert launched(game.step()) == [game.trees[0].root]


def test_guesses_run_ahead_only_while_no_root_is_unsent_and_stages_are_idle() -> None:
    game = Game(2, 8)
    game.send(0, 1)
    game.grow(0)
    assert [node.parent for node in launched(game.step())] == [game.trees[0].root]
    busy = Game(64, 8)
    busy.send(*range(64))
    busy.grow(*range(64), share=0.3)
    assert busy.step() is None, "their ancestors will be known when the next roots leave"


def test_no_run_of_guesses_holds_up_those_behind_it() -> None:
    game = Game(2, 32)
    game.send(0, 1)
    for tree in game.trees:
        for token in range(20):
            tree.add(tree.root, token, math.log(0.045))
    step = game.step()
    assert step is None or len(step.nodes) <= 2, "the usual run has one row"  # type: ignore[union-attr]


def test_a_run_with_roots_is_not_much_longer_than_the_usual_one() -> None:
    game = Game(2, 2)
    game.many = Many(CONTINUOUS, 2, CostCurve(CPU))
    for _ in range(3):
        for root in launched(game.step()):
            game.trees[root.sequence].advance(1)
    for _ in range(20):
        game.grow(0, 1)
    for _ in range(2):
        assert len(launched(game.step())) == 1


def test_guesses_have_no_more_slots_than_there_are() -> None:
    game = Game(2, 1, FLAT)
    game.many = Many(CONTINUOUS, 1, CostCurve(FLAT))
    for _ in range(6):
        game.grow(0, 1)
    assert len(launched(game.step(room=3))) == 5
    assert game.step(root_room=0) is None


def test_traffic_forgets() -> None:
    traffic = Traffic(0.0, 4, 2, 2, 1.0)
    assert traffic.rate == pytest.approx(2.0)
    assert (traffic.roots, traffic.run_s, traffic.rows_per_root) == (2.0, 1.0, 1.0)
    now = 0.0
    for _ in range(600):
        now += 0.5
        traffic.launched(1, 3, 0.4, 0.2)
        traffic.accepted(2, 4, now)
    assert traffic.rate == pytest.approx(4.0, rel=0.02)
    assert traffic.runs_per_s == pytest.approx(2.0, rel=0.02)
    assert traffic.busy == pytest.approx(0.8, rel=0.02)
    assert traffic.run_s == pytest.approx(0.4, rel=0.02)
    assert traffic.rows_per_root == pytest.approx(3.0, rel=0.02)
    assert traffic.wait_s == pytest.approx(0.2, rel=0.02)


def test_when_the_next_level_is_expected() -> None:
    drafting = Drafting(10.0, 0.8)
    first, second = trees = [Tree(0, 4, 100, sequence) for sequence in (1, 2)]
    drafting.look(trees, 0.0, False)
    first.root.is_drafted = True
    first.add(first.root, 1, -0.1)
    drafting.look(trees, 20.0, False)  # a pass ends, another one begins
    assert drafting.wait_s(first, 20.0) == 10.0
    assert drafting.leaf(first) == pytest.approx(math.exp(-0.1))
    second.advance(1)
    drafting.look(trees, 24.0, False)
    assert drafting.wait_s(second, 24.0) == 16.0, "the pass under way knows nothing of it"
    assert drafting.wait_s(first, 24.0) == 6.0
    second.root.is_drafted = True
    second.add(second.root, 1, -0.1)
    drafting.look(trees, 28.0, True)
    assert drafting.pass_s == 9.5, "8 seconds, a quarter of the weight"


def test_while_prompts_wait_guesses_leave_with_their_roots_only_and_rows_are_dear() -> None:
    rows = []
    for prompts in (0, 100):
        game = Game(8, 8, draft_s=0.0)
        for _ in range(3):
            game.grow(0)
        rows.append(len(launched(game.step(prompts=prompts))))
    assert rows == [4, 1]
    game = Game(8, 8)
    game.send(*range(8))
    game.grow(*range(8))
    assert game.step(prompts=1) is None
