"""Speculation is never much slower than plain decoding, from the first token on, where passes were measured at start.

In virtual time: drafts that are never right, and right ones whose rows are as dear as passes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, repeat

import pytest

from pipeinfer.core.links import Link
from pipeinfer.core.ports import Request
from pipeinfer.runtime.pass_times import ROWS
from pipeinfer.sim.world import World, WorldSpec
from speculation.schedules.cost_curve import Costs, Priors
from speculation.schedules.policy import CONTINUOUS, PLAIN, Policy
from speculation.schedules.schedule import Placement
from stages.models.emulated import EmulatedSpec

LAYERS = 8
DRAFT_S = 0.15
"""Where a pass of the whole target takes a second."""
TOKENS = 256
SURE = (0.7, 0.15, 0.05)


def emitted_at(policy: Policy, stages: int, placement: Placement, model: EmulatedSpec, row_cost: float) -> list[float]:
    """When each token was out."""

    def dear(rows: int) -> float:
        return 1.0 + row_cost * (rows - 1)

    def costs(seconds: Callable[[int], float]) -> Costs:
        return tuple((rows, seconds(rows)) for rows in ROWS)

    priors = Priors(costs(lambda rows: dear(rows) / stages), costs(dear), costs(lambda rows: DRAFT_S))
    request = Request(tuple(range(1, 17)), TOKENS)
    paces = (lambda rows, context: dear(rows) / LAYERS, lambda rows, context: DRAFT_S)
    link = Link(delay_s=1e-3, bandwidth=1e9)
    numbers = (model.seed, policy, stages, (request,), model)
    world = World(WorldSpec(*numbers, paces=paces, link=link, context=512, placement=placement, priors=priors))
    (answer,) = world.run(10_000_000)
    return list(chain.from_iterable(repeat(when, count) for when, count in answer.emitted_at))


@pytest.mark.slow
@pytest.mark.parametrize(("stages", "placement"), [(1, "alone"), (1, "spread"), (2, "spread"), (4, "spread")])
@pytest.mark.parametrize(
    ("ranks", "claims", "row_cost"),
    [((0.0,), None, 0.0), ((0.0,), SURE, 0.0), ((0.0,), SURE, 0.15), ((0.0,), SURE, 1.0), ((1.0,), None, 1.0)],
    ids=["never right", "never right but sure", "the same, rows cost", "the same, rows are dear", "right but dear"],
)
def test_speculation_is_never_slower(
    ranks: tuple[float, ...], claims: tuple[float, ...] | None, row_cost: float, stages: int, placement: Placement
) -> None:
    model = EmulatedSpec(LAYERS, 5000, 3, ranks, claims)
    plain, found = (emitted_at(policy, stages, placement, model, row_cost) for policy in (PLAIN, CONTINUOUS))
    assert (plain[63] - plain[0]) / (found[63] - found[0]) >= 0.93
    assert (plain[255] - plain[63]) / (found[255] - found[63]) >= 0.98
