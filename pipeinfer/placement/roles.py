"""Which layers each stage has, and which rank hosts which role: pure functions, the same on every rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pipeinfer.core.addresses import ORCHESTRATOR, address_name, drafter_address, stage_address
from pipeinfer.core.errors import refuse


@dataclass(frozen=True, slots=True)
class Role:
    """A role by its address; ``layers`` are a stage's. ``part``: this rank's number in the group of ranks that share
    the role's model; the machine is with part 0."""

    address: int
    layers: range | None = None
    part: int = 0

    @property
    def name(self) -> str:
        """As people read it: ``orchestrator``, ``stage 3``, ``drafter 0``, ``part 1 of stage 3``."""
        return f"part {self.part} of {address_name(self.address)}" if self.part else address_name(self.address)


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


def assign(
    ranks: int, layers: int, drafters: int, head_cost: float = 0.0, tp: int = 1, stages: int | None = None
) -> Plan:
    """Rank 0 orchestrates and hosts the first drafter; stages follow in rank order, further drafters last. Without a
    drafter rank 0 is a stage as well; one rank alone is everything.

    ``tp`` ranks share each stage, the first of them leads. ``ranks`` are ``tp`` times as many as stages, and the
    drafters' own; or no drafter has its own: then rank 0 leads the first stage, orchestrates and drafts, and its group
    shares the drafts too. ``stages``: how many there have to be. Raises UserError where the numbers do not fit."""
    if tp > 1 or stages is not None:
        return _refuse_other(_assign_groups(ranks, layers, drafters, head_cost, tp), stages)
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


def _assign_groups(ranks: int, layers: int, drafters: int, head_cost: float, tp: int) -> Plan:
    have_ranks = ranks > drafters and (ranks - drafters) % tp == 0 and ranks > 1
    if not have_ranks and ranks % tp:
        wanted = f"{tp} times the stages, or {drafters} more" if drafters else f"{tp} times the stages"
        refuse(f"{ranks} ranks with --tp {tp} and {drafters} drafters", f"use as many ranks as {wanted}")
    stages = (ranks - drafters if have_ranks else ranks) // tp
    if stages > layers:
        refuse(f"{ranks} ranks make {stages} stages, but the target has {layers} layers", "use fewer, or a larger --tp")
    shares = split_layers(layers, stage_sizes(layers, stages, head_cost))
    drafts = [Role(drafter_address(index)) for index in range(drafters)]
    groups = [[(Role(stage_address(index), share, part),) for part in range(tp)] for index, share in enumerate(shares)]
    first = (Role(ORCHESTRATOR), *(drafts[:1] if have_ranks else drafts))
    if have_ranks and drafts:
        return (first, *(rank for group in groups for rank in group), *((draft,) for draft in drafts[1:]))
    shared = [(*(replace(draft, part=part) for draft in drafts), *groups[0][part]) for part in range(tp)]
    leads = (*first, *groups[0][0])
    return (leads, *shared[1:], *(rank for group in groups[1:] for rank in group))


def _refuse_other(plan: Plan, stages: int | None) -> Plan:
    found = count(plan)[0]
    if stages not in (None, found):
        refuse(f"--stages {stages}, but {len(plan)} ranks make {found}", "use other --ranks or --tp, or leave it out")
    return plan


def group_of(plan: Plan, rank: int) -> tuple[int, int]:
    """The first rank of the group that ``rank`` of ``plan`` is in, and how many ranks it has."""
    parts = [max(role.part for role in roles) for roles in plan]
    first = rank - parts[rank]
    size = next((index for index, part in enumerate(parts[first + 1 :], 1) if part != index), len(parts) - first)
    return first, size


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
    return {role.address: rank for rank, roles in enumerate(plan) for role in roles if not role.part}


def count(plan: Plan) -> tuple[int, int]:
    """How many stages and drafters ``plan`` has."""
    roles = [role for rank_roles in plan for role in rank_roles if not role.part]
    stages = sum(role.layers is not None for role in roles)
    return stages, len(roles) - stages - 1
