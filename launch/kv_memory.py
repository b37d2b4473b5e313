"""KV slots for the memory that a job may use for them."""

from __future__ import annotations

from pipeinfer.core.config import Config
from pipeinfer.core.errors import refuse
from pipeinfer.placement.roles import Plan
from stages.checkpoint.spec import ModelSpec
from stages.models.generic_spec import GenericSpec

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a key's or value's number."""


def slot_nbytes(spec: ModelSpec | GenericSpec, plan: Plan, config: Config) -> int:
    """Bytes of one KV slot on the rank that has most layers of the target ``spec``. ``config``: with its dtype
    resolved."""
    size = SIZES[config.dtype]
    layers = max((role.layers for roles in plan for role in roles if role.layers), key=len)
    if isinstance(spec, GenericSpec):
        return size * sum(heads * (key + value) for heads, key, value in spec.kv_shapes[layers.start : layers.stop])
    heads = -(-spec.kv_head_count // config.tp)  # ranks of a group that are more than the heads each have one
    return size * 2 * heads * spec.head_dim * len(layers)


def kv_slots(spec: ModelSpec | GenericSpec, plan: Plan, config: Config, context: int) -> int:
    """Slots for accepted tokens, of every stage: what ``config`` allows, and no more than its requests can use.
    Raises UserError if one request of ``context`` tokens does not fit."""
    most = config.max_num_seqs * context
    if not config.kv_memory:
        return most
    each = slot_nbytes(spec, plan, config)
    slots = config.kv_memory // each
    if slots < context:
        refuse(
            f"--kv-memory {config.kv_memory} bytes: one request of {context} tokens needs {context * each} on a rank",
            "allow more, or ask for less --context",
        )
    return min(slots, most)
