"""Which layers each stage has, and which rank hosts which role: pure functions, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeinfer.core.addresses import ORCHESTRATOR, address_name, drafter_address, stage_address
from pipeinfer.core.errors import refuse


@dataclass(frozen=True, slots=True)
class Role:
    """A role by its address; ``layers`` are a stage's."""

    address: int
    layers: range | None = None

    @property
    def name(self) -> str:
        """As people read it: ``orchestrator``, ``stage 3``, ``drafter 0``."""
        return address_name(self.address)


Plan = tuple[tuple[Role, ...], ...]
"""The roles of each rank, by rank."""


def split_layers(layers: int, sizes: Sequence[float], whole: Callable[[float], int] = math.floor) -> list[range]:
    """Split layers 0 to ``layers`` - 1 into one contiguous share per stage, in order.

    ``sizes``: the relative size of each stage, at least one, with a positive sum. ``whole`` turns the exact end of a
    share into a whole layer: ``math.floor`` or ``round``. A share is empty where a size is too small for a layer."""
    ends = [math.fsum(sizes[: index + 1]) for index in range(len(sizes))]  # exactly rounded, for ties
    cuts = [0, *(whole(layers * end / ends[-1]) for end in ends)]
    return [range(start, end) for start, end in pairwise(cuts)]


def stage_sizes(layers: int, stages: int, head_cost: float = 0.0) -> list[int]:
    """The relative sizes of ``stages`` stages, for split_layers. Their shares are as even as possible.

    ``head_cost``: the cost of the output head on the last stage, in layers. ``stages`` is from 1 to ``layers``."""
    if stages == 1:
        return [1]
    last = max(1, min(layers - stages + 1, round((layers + head_cost) / stages - head_cost)))
    return [layers - last] * (stages - 1) + [last * (stages - 1)]


def assign(ranks: int, layers: int, drafters: int, head_cost: float = 0.0) -> Plan:
    """Rank 0 orchestrates and hosts the first drafter; stages follow in rank order, further drafters last. Without a
    drafter rank 0 is a stage as well; one rank alone is everything."""
    stages = max(1, ranks - drafters) if ranks > 1 else 1
    if ranks > 1 and stages + drafters > ranks:
        refuse(f"{ranks} ranks cannot hold {drafters} drafters and a stage", f"use at least {drafters + 1} ranks")
    if stages > layers:
        refuse(
            f"{ranks} ranks make {stages} stages, but the target has {layers} layers",
            f"use at most {layers + drafters} ranks",
        )
    shares = split_layers(layers, stage_sizes(layers, stages, head_cost))
    return place(shares, drafters, is_alone=ranks == 1)


def place(shares: Sequence[range], drafters: int, is_alone: bool = False, is_rank_0_shared: bool = True) -> Plan:
    """The plan of stages with these ``shares`` of the layers and of ``drafters`` drafters; see assign.

    ``is_alone``: one rank hosts every role. ``is_rank_0_shared``: rank 0 hosts a second role beside the orchestrator;
    otherwise every role has a rank of its own."""
    stage_roles = [Role(stage_address(index), share) for index, share in enumerate(shares)]
    drafter_roles = [Role(drafter_address(index)) for index in range(drafters)]
    if is_alone:
        return ((Role(ORCHESTRATOR), *drafter_roles, *stage_roles),)
    beside = (drafter_roles[:1] or stage_roles[:1]) if is_rank_0_shared else []
    others = [role for role in (*stage_roles, *drafter_roles) if role not in beside]
    return ((Role(ORCHESTRATOR), *beside), *((role,) for role in others))


def rank_of_role(plan: Plan) -> dict[int, int]:
    """The rank of every role, by address."""
    return {role.address: rank for rank, roles in enumerate(plan) for role in roles}


def count(plan: Plan) -> tuple[int, int]:
    """How many stages and drafters ``plan`` has."""
    roles = [role for rank_roles in plan for role in rank_roles]
    stages = sum(role.layers is not None for role in roles)
    return stages, len(roles) - stages - 1
