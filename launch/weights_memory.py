"""Refuses a job whose weights do not fit into the memory that it may use for them, before anything is loaded."""

from __future__ import annotations

from launch.kv_memory import SIZES
from pipeinfer.core.config import Config
from pipeinfer.core.errors import refuse
from pipeinfer.placement.roles import Plan
from stages.checkpoint.checkpoint import Weights
from stages.checkpoint.spec import FAMILIES, ModelSpec
from stages.kernels.library import reason
from stages.models.generic_spec import GenericSpec
from stages.models.split import Split
from stages.models.weights_plan import shard_plan


def refuse_weights_memory(
    target: tuple[ModelSpec | GenericSpec, Weights], plan: Plan, config: Config, has_kernels: bool
) -> None:
    """Raise UserError where ``config``, with its dtype resolved, asks for too little memory for some stage of ``plan``,
    or for a model that is not streamed."""
    if not config.weights_memory:
        return
    spec, weights = target
    what = f"--weights-memory {config.weights_memory}"
    if config.random_weights:
        refuse(f"{what} with --random-weights", "leave one of them out: random weights are in no file")
    if not isinstance(spec, ModelSpec):
        refuse(f"{what}: the weights of {config.target} are always resident", f"use a model of {', '.join(FAMILIES)}")
    if not has_kernels:
        refuse(f"{what} without the library of decode kernels", f"leave it out ({reason()})")
    stages = dict.fromkeys(role.layers for roles in plan for role in roles if role.layers)
    for layers in sorted(stages, key=len, reverse=True):
        for rank in range(config.tp):
            split = Split(spec, rank, config.tp)
            shard_plan(weights, split, layers, SIZES[config.dtype], config.weights_memory)
