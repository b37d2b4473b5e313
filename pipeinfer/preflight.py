"""Everything that can be refused before a model is loaded or a rank is started: without MPI, and for the Llama family
without torch, in well under a second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launch.roles import Plan, assign
from pipeinfer.config import DEFAULT_CONTEXT, DTYPES, Config
from pipeinfer.errors import refuse
from pipeinfer.text import vocabulary
from pipeinfer.trace import refuse_unwritable
from speculation.policy import Policy
from stages.checkpoint import Checkpoint
from stages.generic_spec import GenericSpec
from stages.spec import ModelSpec, is_llama_family


@dataclass(frozen=True, slots=True)
class Cleared:
    """A job that may start: the models' specs and checked checkpoints, the plan, and the context it serves."""

    target: tuple[ModelSpec | GenericSpec, Checkpoint]
    drafts: list[tuple[ModelSpec | GenericSpec, Checkpoint]]  # drafter by drafter
    plan: Plan
    context: int


def clear(config: Config, ranks: int) -> Cleared:
    """Check ``config`` for ``ranks`` ranks. Raises UserError, whose message names the thing and the fix."""
    if config.dtype not in DTYPES:
        refuse(f"unknown dtype {config.dtype!r}", f"use one of {', '.join(DTYPES)}")
    if ranks < 1:
        refuse(f"{ranks} ranks", "use at least one")
    if config.trace is not None:
        refuse_unwritable(config.trace, ranks)
    policy = Policy(**config.policy)
    places = config.draft_directories if policy.speculate else []
    if policy.speculate and not places and (policy.schedule != "continuous" or not policy.lookup):
        refuse(f"policy {policy.name} needs a draft model", "give one with --draft DIR, or use --policy plain")
    target = _model(config.target_directory)
    models = {place: _model(place) for place in dict.fromkeys(places)}
    for place in models:
        _same_vocabulary(config.target_directory, place)
    spec, _ = target
    if config.context > spec.context:
        refuse(f"--context {config.context}, but the target was made for {spec.context} tokens", "ask for fewer")
    context = config.context or min(spec.context, DEFAULT_CONTEXT)
    plan = assign(ranks, spec.layer_count, len(places), spec.head_in_layers)
    return Cleared(target, [models[place] for place in places], plan, context)


def _model(directory: Path) -> tuple[ModelSpec | GenericSpec, Checkpoint]:
    if not is_llama_family(directory):  # the only case that loads torch: such a model has to be looked at
        return GenericSpec.read(directory), Checkpoint(directory)
    spec = ModelSpec.read(directory)
    checkpoint = Checkpoint(directory)
    checkpoint.validate(spec)
    return spec, checkpoint


def _same_vocabulary(target_directory: Path, draft_directory: Path) -> None:
    target, draft = vocabulary(target_directory), vocabulary(draft_directory)
    if target != draft:
        odd = sorted(token for token in target.keys() | draft.keys() if target.get(token) != draft.get(token))
        refuse(
            f"target and draft have different vocabularies ({len(odd)} tokens differ, {odd[0]!r} for one)",
            "use a draft made with the target's tokenizer",
        )
