"""What passes cost, measured by every rank after loading and gathered, so that the first request is served by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from launch.pass_cache import PassCache
from pipeinfer.core.addresses import ORCHESTRATOR
from pipeinfer.core.ports import Pair, ShardModel
from pipeinfer.placement.roles import Role
from pipeinfer.runtime.job_spec import JobSpec
from pipeinfer.runtime.pass_times import pass_times, together
from speculation.drafter.machine import draft_slots
from speculation.schedules.prefill_chunks import PrefillChunks

if TYPE_CHECKING:
    from launch.mpi import World


def are_of_use(job_spec: JobSpec) -> bool:
    """Whether something is decided by what passes cost: which guesses pay, or how prompts are cut for the stages."""
    policy = job_spec.policy
    is_governed = policy.schedule == "continuous" and policy.speculate and policy.govern
    return is_governed or PrefillChunks(policy, job_spec.stages, job_spec.placement).depend_on_costs


def measured(
    job_spec: JobSpec, roles: Sequence[Role], shards: Mapping[int, ShardModel], pair: Pair, cache: PassCache | None
) -> dict[str, Any]:
    """The PassTimes of this rank's ``shards``, from ``cache`` where it has them."""
    found: dict[str, Any] = {"stages": [], "drafts": []}
    for role in roles:
        if role.address == ORCHESTRATOR:
            continue
        facts = {"layers": [role.layers.start, role.layers.stop]} if role.layers else {"drafter": role.address}
        measure = partial(_times, job_spec, role, shards[role.address], pair)
        times = cache.times(measure, **facts) if cache else measure()
        found["stages" if role.layers else "drafts"].append(times)
    return found


def _times(job_spec: JobSpec, role: Role, shard: ShardModel, pair: Pair) -> list[tuple[int, float]]:
    policy = job_spec.policy
    if role.layers is None:
        return pass_times(
            shard, draft_slots(policy, job_spec.context, job_spec.max_num_seqs, job_spec.kv_slots), choices=policy.topk
        )
    blank = pair.blank if role.layers.start else None
    return pass_times(shard, sum(job_spec.slots), blank, choices=int(role.layers.stop == pair.layers))


def agreed(found: dict[str, Any], world: World | None) -> dict[str, Any]:
    """The costs of a JobSpec, from what every rank has ``found``, alike on all ranks. Collective."""
    if world is None:
        return together([found])
    everybody = world.gather(found)
    return world.broadcast(dict(together(everybody)) if world.is_head else {})
