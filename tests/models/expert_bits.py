"""Random models with experts for kernel_bits: the same bits for a row alone and in every company.

A world's routers are random (see ROUTERS); or experts 0 and 1, 2 and 3, ... have equal scores (``pairs``); or all have
(``equal``), and then every row has the first ones and nobody any other; or every row of positive numbers has expert 3
before others (``one``)."""

from __future__ import annotations

import random
from dataclasses import replace

from torch import Tensor

from stages.checkpoint.spec import FAMILIES, ExpertSpec, ModelSpec
from tests.models.kernel_bits import RandomWeights, World, draw_world

ROUTERS = ("random", "pairs", "equal", "one")
MOST_WEIGHTS = 3_000_000
"""Of the experts of a layer: larger ones are drawn again."""


class ExpertWeights(RandomWeights):
    """``router``: of ROUTERS."""

    def __init__(self, spec: ModelSpec, seed: int, bad: int | None, router: str = "random") -> None:
        super().__init__(spec, seed, bad)
        self.router = router

    def _tensor(self, name: str) -> Tensor:
        found = super()._tensor(name)
        if name.endswith(".gate.weight"):
            if self.router == "equal":
                found.zero_()
            elif self.router == "pairs":
                found[1::2] = found[: len(found) // 2 * 2 : 2]
            elif self.router == "one":
                found[3:4] = 1.0
        return found


def draw_experts(dice: random.Random) -> ExpertSpec:
    """Some experts, under the names of some family."""
    count = dice.choice((1, 2, 4, 8, 8, 17, 40))
    usual = dice.choice([family.experts for family in FAMILIES.values() if family.experts is not None])
    return replace(usual, count=count, chosen=dice.randint(1, min(count, 5)), is_normalised=dice.random() < 0.7)


def draw_expert_world(seed: int) -> World:
    """A world of kernel_bits with experts instead of the model's MLPs."""
    world, dice = draw_world(seed, long_texts=False), random.Random(f"experts {seed}")
    experts = draw_experts(dice)
    while True:
        inner = dice.choice((16, 33, 48, 112, 200, 1000))
        if 3 * inner * world.spec.hidden_size * experts.count <= MOST_WEIGHTS or inner == 16:
            break
    world.spec = replace(world.spec, intermediate_size=inner, mlp_bias=False, experts=experts)
    world.weights = ExpertWeights(world.spec, seed, world.weights.bad, dice.choice((*ROUTERS, "random")))
    return world
