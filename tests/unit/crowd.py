"""A world of several requests at once, with too few slots for all of them: some are preempted, some share prefixes."""

from __future__ import annotations

import random

from pipeinfer.core.ports import Request
from pipeinfer.sim.world import WorldSpec
from speculation.schedules.policy import Policy
from stages.models.emulated import EmulatedSpec, spread

STAGES = 3


def crowd(policy: Policy, requests: int = 9, seed: int = 3, top1: float = 0.7, slots: int = 100) -> WorldSpec:
    """``requests`` of different lengths, of which up to 6 are decoded at once in ``slots`` slots. Some begin alike, the
    fifth goes before others."""
    rng = random.Random(f"crowd {seed}")
    common = tuple(rng.randrange(40) for _ in range(20))
    made = []
    for index in range(requests):
        own = tuple(rng.randrange(40) for _ in range(rng.randint(2, 12)))
        made.append(Request((common if index % 3 == 0 else ()) + own, rng.randint(12, 40), priority=-(index == 4)))
    return WorldSpec(
        seed,
        policy,
        STAGES,
        tuple(made),
        EmulatedSpec(layers=6, vocab=40, seed=seed, ranks=spread(top1)),
        draft_s=0.3,
        row_cost=0.05,
        context=100,
        at_once=True,
        max_num_seqs=6,
        kv_slots=slots,
        guess_slots=8,
        keeps_prefixes=True,
    )
