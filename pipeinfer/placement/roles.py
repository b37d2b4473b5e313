"""Which rank plays what: one pure function, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeinfer.core.errors import refuse
from pipeinfer.core.protocol import ORCHESTRATOR, address_name, drafter_address, stage_address


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


def split_layers(layers: int, stages: int, head_cost: float = 0.0) -> list[range]:
    """Contiguous shares of ``layers`` layers, as even as can be; ``head_cost`` is what the last stage's output head
    costs beside them, in layers."""
    last = max(1, min(layers - stages + 1, round((layers + head_cost) / stages - head_cost)))
    others = layers - last if stages > 1 else 0
    cuts = [others * index // max(1, stages - 1) for index in range(stages)] + [layers]
    return [range(start, end) for start, end in pairwise(cuts)]


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
    return place(split_layers(layers, stages, head_cost), drafters, is_alone=ranks == 1)


def place(shares: Sequence[range], drafters: int, is_alone: bool = False) -> Plan:
    """The plan of stages with these ``shares`` of the layers and so many drafters; see assign."""
    stage_roles = [Role(stage_address(index), share) for index, share in enumerate(shares)]
    drafter_roles = [Role(drafter_address(index)) for index in range(drafters)]
    if is_alone:
        return ((Role(ORCHESTRATOR), *drafter_roles, *stage_roles),)
    beside = drafter_roles[:1] or stage_roles[:1]
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
