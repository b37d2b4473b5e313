"""Loads the models of one rank."""

from __future__ import annotations

from collections.abc import Iterable

from pipeinfer.core.addresses import FIRST_DRAFTER, ORCHESTRATOR
from pipeinfer.core.ports import Pair, ShardModel
from pipeinfer.placement.roles import Role
from pipeinfer.runtime.job_spec import JobSpec
from speculation.drafter.machine import draft_slots


def load_shards(job_spec: JobSpec, roles: Iterable[Role], pair: Pair) -> dict[int, ShardModel]:
    """Load the models of ``roles`` from ``pair``. Returns them by the role's address.

    A stage has the KV slots that ``job_spec`` gives every stage. A drafter has those that its draft may need. The
    orchestrator has no model. Raises what ``pair`` raises, for instance UserError where memory is too small."""
    shards: dict[int, ShardModel] = {}
    for role in sorted(roles, key=lambda role: role.layers is not None):  # drafts first: they are small
        if role.layers is not None:
            shards[role.address] = pair.stage(role.layers, sum(job_spec.slots))
        elif role.address != ORCHESTRATOR:
            capacity = draft_slots(job_spec.policy, job_spec.context, job_spec.max_num_seqs, job_spec.kv_slots)
            shards[role.address] = pair.draft(role.address - FIRST_DRAFTER, capacity)
    return shards
