"""Where one rank is everything the draft goes first as long as that gives more tokens per second, and no longer."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from pipeinfer.core.ports import Request
from pipeinfer.sim.world import World, WorldSpec
from speculation.schedules.alternation import PATIENCE, Alternation
from speculation.schedules.continuous import Continuous
from speculation.schedules.cost_curve import CostCurve
from speculation.schedules.launch_delay import Offer
from speculation.schedules.policy import CONTINUOUS, PLAIN, Policy
from speculation.schedules.schedule import Launch, Order, Situation
from speculation.trees.tree import Node, Tree
from stages.models.emulated import EmulatedSpec, spread

PASS_S = 0.1
GUESSED = 0.8
MORE_LEAVES = 8


def curve_of(*known: tuple[int, float]) -> CostCurve:
    curve = CostCurve()
    for rows, seconds in known:
        curve.observe(rows, seconds)
    return curve


FLAT = curve_of(*((rows, 1.0) for rows in (1, 2, 4, 8, 16, 32)))


def hang(parent: Node, tree: Tree) -> None:
    """The draft has looked at ``parent``."""
    tree.add(parent, 0, math.log(GUESSED))
    parent.is_drafted = True


def path(tree: Tree) -> list[Node]:
    """The root and what is below it, one child each."""
    found = [tree.root]
    while found[-1].children:
        found += found[-1].children.values()
    return found


def drafted(alternation: Alternation, tree: Tree, now: float, curve: CostCurve = FLAT, pass_s: float = PASS_S) -> int:
    """How many passes the draft makes before a run leaves."""
    passes = 0
    while True:
        alternation.look(tree, now)
        assert not alternation.is_on(now)
        if not alternation.instead(Offer(tree, path(tree), curve, 32, MORE_LEAVES, now)):
            return passes
        assert alternation.is_on(now), "its turn has begun"
        hang(path(tree)[-1], tree)
        passes, now = passes + 1, now + pass_s
        alternation.drafted()


def taught(rng: random.Random, pass_s: float = PASS_S) -> tuple[Alternation, Tree, float]:
    """An alternation that has seen a thousand tokens of which the draft knew four in five, at a new root."""
    alternation, tree, now = Alternation(), Tree(0, 0, 1000), 0.0
    while tree.root.position < 1000:
        drafted(alternation, tree, now, pass_s=pass_s)
        is_over = False
        while not is_over:  # the target verifies them
            is_over = not tree.root.children
            tree.take(tree.root)
            tree.advance(0 if rng.random() < GUESSED else 9)
            is_over |= tree.root.token == 9
        now += 10.0
    tree.prune()
    alternation.look(tree, now)
    return alternation, tree, now


@pytest.mark.parametrize("pass_s", [0.01, 0.03, 0.1, 0.3, 0.5])
def test_it_drafts_about_as_deep_as_gives_most_tokens_per_second(pass_s: float) -> None:
    def rate(levels: int) -> float:
        return (1 - GUESSED ** (levels + 1)) / (1 - GUESSED) / (1 + levels * pass_s)

    alternation, tree, now = taught(random.Random(3), pass_s)
    levels = drafted(alternation, tree, now, pass_s=pass_s)
    assert rate(levels) > 0.97 * max(map(rate, range(32))), levels


def test_it_looks_beyond_a_step_of_the_cost_curve() -> None:
    """Two rows cost nearly twice as much as one, eight hardly more: one guess is not worth it, a few are."""
    alternation, tree, now = taught(random.Random(4))
    step = curve_of((1, 1.0), (2, 1.9), (4, 1.9), (8, 1.9), (16, 2.0))
    assert drafted(alternation, tree, now, step) > 3


def test_a_draft_that_has_nothing_to_say_is_not_asked_again_before_the_root_has_moved() -> None:
    alternation, tree, now = taught(random.Random(5))
    assert alternation.instead(Offer(tree, [tree.root], FLAT, 32, MORE_LEAVES, now))
    alternation.drafted()
    alternation.look(tree, now)
    assert not alternation.is_on(now)
    assert not alternation.instead(Offer(tree, [tree.root], FLAT, 32, MORE_LEAVES, now))
    tree.take(tree.root)
    tree.advance(9)
    alternation.look(tree, now)
    assert not alternation.is_on(now)
    assert alternation.instead(Offer(tree, [tree.root], FLAT, 32, MORE_LEAVES, now))


def test_a_draft_that_was_too_slow_is_measured_again() -> None:
    alternation, tree, now = taught(random.Random(6), pass_s=5.0)
    waits = []
    for _ in range(3 * PATIENCE):
        waits.append(drafted(alternation, tree, now, pass_s=PASS_S if len(waits) > 70 else 5.0))
        tree.take(tree.root)
        tree.advance(9)
        tree.prune()
        now += 10.0
    assert 0 < sum(waits[:70]) <= 4, "it is tried, but seldom"
    assert min(waits[2 * PATIENCE :]) > 0, "it has become quick"


def test_while_nobody_knows_what_a_run_costs_the_target_goes_first() -> None:
    alternation, tree = Alternation(), Tree(0, 0, 100)
    alternation.look(tree, 0.0)
    assert not alternation.instead(Offer(tree, [tree.root], CostCurve(), 32, MORE_LEAVES, 0.0))
    assert alternation.instead(Offer(tree, [tree.root], FLAT, 32, MORE_LEAVES, 0.0))


def test_what_was_looked_up_is_no_reason_not_to_draft_but_what_the_draft_has_seen_is() -> None:
    alternation, tree, now = taught(random.Random(7))
    looked_up = tree.add(tree.root, 5, math.log(0.1))
    assert looked_up is not None
    assert alternation.instead(Offer(tree, [tree.root], FLAT, 32, MORE_LEAVES, now))
    alternation, tree, now = taught(random.Random(7))
    tree.root.is_drafted = True
    assert not alternation.instead(Offer(tree, [tree.root], FLAT, 32, MORE_LEAVES, now))


def test_the_schedule_orders_single_passes_and_waits_for_each() -> None:
    schedule, tree = Continuous(CONTINUOUS, "alone"), Tree(0, 0, 100)
    schedule.opened(tree)
    now = Situation([tree], credits=1, in_flight=0, slots=4, room=8, now=10.0)
    assert schedule.next(now) == Order(0), "nothing is drafted but when it is told"
    schedule.returned(1, 1.0, 8.0, carries_root=True)
    assert schedule.next(now) == Order(1, draft_batch=8)
    assert schedule.next(replace(now, now=12.0)) is None
    schedule.drafted(tree, [])
    launch = schedule.next(replace(now, now=12.0))
    assert isinstance(launch, Launch)
    assert launch.nodes == [tree.root]


def decoded(policy: Policy, draft_s: float, top1: float, row_cost: float) -> float:
    """Tokens per stage time of one rank with an emulated pair."""
    speeds = []
    for seed in range(3):
        request = Request(tuple(range(seed, seed + 16)), 96)
        model = EmulatedSpec(4, 5000, seed, spread(top1))
        world = World(
            WorldSpec(
                seed, policy, 1, (request,), model, draft_s=draft_s, row_cost=row_cost, context=112, placement="alone"
            )
        )
        (answer,) = world.run()
        speeds.append(95 / (answer.emitted_at[-1][0] - answer.emitted_at[0][0]))
    return sum(speeds) / len(speeds)


@pytest.mark.parametrize(
    ("draft_s", "top1", "row_cost", "least"),
    [(0.03, 0.79, 0.0, 3.4), (0.1, 0.9, 0.0, 3.0), (0.3, 0.79, 0.0, 1.6), (0.3, 0.5, 0.05, 1.05), (3.0, 0.9, 0.0, 0.9)],
)
def test_one_rank_gains_about_as_much_as_a_tree_of_the_best_size(
    draft_s: float, top1: float, row_cost: float, least: float
) -> None:
    speed = decoded(CONTINUOUS, draft_s, top1, row_cost)
    assert speed > least * decoded(PLAIN, draft_s, top1, row_cost)
    if draft_s < 1.0:
        sizes = [(num_steps, rows) for num_steps in (1, 2, 4, 8) for rows in (8, 32)]
        tree = Policy("tree", schedule="rounds", topk=8, draft_batch=16, max_ahead=512, cancel="off")
        best = max(
            decoded(replace(tree, num_steps=num_steps, max_rows=rows), draft_s, top1, row_cost)
            for num_steps, rows in sizes
        )
        assert speed > 0.85 * best, (speed, best)
