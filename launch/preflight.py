"""Everything that can be refused before a model is loaded or a rank is started: without MPI, and for the Llama family
without torch, in well under a second."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from launch.cores import refuse_threads
from launch.kv_memory import kv_slots
from launch.weights_memory import refuse_weights_memory
from pipeinfer.core.config import ACTIVATIONS, AUTO, DEFAULT_CONTEXT, DTYPES, FUSED, NUMERICS, Config, resolve_dtype
from pipeinfer.core.errors import refuse
from pipeinfer.core.self_draft import is_self_draft
from pipeinfer.placement.roles import Plan, assign
from pipeinfer.runtime.trace import refuse_unwritable
from pipeinfer.text import Text, has_tokenizer, refuse_foreign_tokenizer, same_tokens, vocabulary_of
from speculation.schedules.policy import Policy
from stages.checkpoint.checkpoint import Checkpoint, Weights
from stages.checkpoint.folder import is_gguf_name, model_folder, plain
from stages.checkpoint.opening import open_weights
from stages.checkpoint.random_weights import RandomCheckpoint
from stages.checkpoint.spec import FAMILIES, ModelSpec, architecture_of, is_llama_family
from stages.kernels.group import MOST_RANKS
from stages.kernels.library import library, reason
from stages.models.forced import FORCED_TOKENS
from stages.models.generic_spec import GenericSpec
from stages.models.self_draft import self_draft
from stages.models.split import refuse_unsplittable

MOST_SEQUENCES = 512
"""Most requests that are decoded at once: a run has at most MAX_ROWS rows."""
Model = tuple[ModelSpec | GenericSpec, Weights]


@dataclass(frozen=True, slots=True)
class Cleared:
    """A job that may start: the models' specs and checked weights, the plan, and the context it serves.

    ``config``: with every dtype and the number of KV slots resolved. ``note``: what its user should know of the dtypes
    and of quantised weights, in one line; empty for nothing."""

    config: Config
    target: Model
    drafts: list[Model]  # drafter by drafter
    plan: Plan
    context: int
    note: str = ""


def clear(config: Config, ranks: int, has_kernels: bool | None = None) -> Cleared:
    """Check ``config`` for ``ranks`` ranks. ``has_kernels``: whether all of them have the kernel library; None for what
    this process has. Raises UserError, whose message names the thing and the fix."""
    _refuse_words(config)
    refuse_threads(config.threads)
    if ranks < 1:
        refuse(f"{ranks} ranks", "use at least one")
    if config.trace is not None:
        refuse_unwritable(config.trace, ranks)
    _refuse_forcing(config)
    policy = Policy(**config.policy)
    names = config.drafts if policy.speculate else ()
    if policy.speculate and not names and (policy.schedule != "continuous" or not policy.prompt_lookup):
        refuse(f"policy {policy.name} needs a draft model", "give one with --draft DIR, or use --policy plain")
    if config.context < 0:
        refuse(f"--context {config.context}", "ask for at least one token, or for 0: what the target was made for")
    has_kernels = library() is not None if has_kernels is None else has_kernels
    read = _random_model if config.random_weights else _model
    target = read(config.target_directory, config.context or DEFAULT_CONTEXT, has_kernels)
    spec, _ = target
    if config.context > spec.context:
        refuse(f"--context {config.context}, but the target was made for {spec.context} tokens", "ask for fewer")
    context = config.context or min(spec.context, DEFAULT_CONTEXT)
    places = [place for name, place in zip(names, config.draft_directories, strict=False) if not is_self_draft(name)]
    models = {place: read(place, context, has_kernels) for place in dict.fromkeys(places)}
    if config.forced_acceptance:
        _refuse_few_tokens(config.tokenizer_directory, {config.target_directory: target, **models})
    else:
        _refuse_tokenizer(config, spec)
        for place in models:
            if config.tokenizer is None or has_tokenizer(place):
                _same_vocabulary(config.tokenizer_directory, place)
    plan = assign(ranks, spec.layer_count, len(names), spec.head_in_layers, config.tp, config.stages)
    drafts = [
        self_draft(name, target) if is_self_draft(name) else models[place]
        for name, place in zip(names, config.draft_directories, strict=False)
    ]
    if config.activations != ACTIVATIONS[0] and not has_kernels:
        refuse(f"--activations {config.activations} needs the C kernels on all ranks", "pipeinfer doctor says more")
    if config.tp > 1:
        _refuse_group(config, spec, has_kernels)
    resolved = _resolved(config, target, drafts, has_kernels)
    resolved = replace(resolved, kv_slots=kv_slots(spec, plan, resolved, context))
    refuse_weights_memory(target, plan, resolved, has_kernels)
    notes = ["" if has_kernels else _note(config, target, drafts)]
    notes += [weights.note for _, weights in (target, *models.values())]
    return Cleared(resolved, target, drafts, plan, context, "; ".join(dict.fromkeys(filter(None, notes))))


def _refuse_words(config: Config) -> None:
    """A dtype, numerics or activations that there are not."""
    choices = (AUTO, *DTYPES)
    for dtype in (config.dtype, *config.draft_dtypes):
        if dtype not in choices:
            refuse(f"unknown dtype {dtype!r}", f"use one of {', '.join(choices)}")
    if config.fused not in FUSED:
        refuse(f"unknown --fused {config.fused}", f"use one of {', '.join(FUSED)}")
    if not 1 <= config.max_num_seqs <= MOST_SEQUENCES:
        refuse(f"--max-num-seqs {config.max_num_seqs}", f"use 1 to {MOST_SEQUENCES} requests at once")
    if not 1 <= config.tp <= MOST_RANKS:
        refuse(f"--tp {config.tp}", f"use 1 to {MOST_RANKS} ranks for a stage")
    if config.numerics not in NUMERICS:
        refuse(f"unknown numerics {config.numerics!r}", f"use one of {', '.join(NUMERICS)}")
    if config.activations not in ACTIVATIONS:
        refuse(f"unknown activations {config.activations!r}", f"use one of {', '.join(ACTIVATIONS)}")


def _refuse_group(config: Config, spec: ModelSpec | GenericSpec, has_kernels: bool) -> None:
    """A target that ranks of a group cannot share."""
    if not has_kernels:
        refuse(f"--tp {config.tp} without the library of decode kernels", f"leave it out ({reason()})")
    if not isinstance(spec, ModelSpec):
        refuse(f"--tp {config.tp}: no group can share {config.target}", f"use a model of {', '.join(FAMILIES)}")
    refuse_unsplittable(spec, config.tp)


def _resolved(config: Config, target: Model, drafts: list[Model], has_kernels: bool) -> Config:
    """``config`` with the dtype of each model."""
    asked = config.draft_dtypes or (config.dtype,) * len(drafts)
    return replace(
        config,
        dtype=resolve_dtype(config.dtype, target[0].dtype, has_kernels),
        draft_dtypes=tuple(
            resolve_dtype(dtype, spec.dtype, has_kernels) for dtype, (spec, _) in zip(asked, drafts, strict=True)
        ),
    )


def _note(config: Config, target: Model, drafts: list[Model]) -> str:
    """Why there are no kernels, and what it costs."""
    why = reason()
    with_kernels = _resolved(config, target, drafts, has_kernels=True)
    if with_kernels == _resolved(config, target, drafts, has_kernels=False):
        return f"{why}: torch computes, several times as slowly"
    return (
        f"{why}: torch computes, several times as slowly, with 16-bit weights held in fp32 (--dtype bf16 or fp16 keeps "
        "16 bits, but tokens may then depend on the policy)"
    )


def _refuse_forcing(config: Config) -> None:
    """What acceptance cannot be forced to."""
    shares = config.forced_acceptance
    if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1 + 1e-6:
        refuse(
            f"--forced-acceptance {','.join(f'{share:g}' for share in shares)}",
            "give the probabilities that a draft's first choice, its second, ... is right: together at most 1",
        )
    if config.random_weights and not shares:
        refuse("--random-weights without --forced-acceptance", "give both: random models agree on nothing")


def _refuse_few_tokens(tokenizer: Path, models: dict[Path, Model]) -> None:
    """Where acceptance is forced vocabularies may differ, but each must have the prompt's tokens and the forced."""
    spec, _ = next(iter(models.values()))
    named = Text(tokenizer).vocabulary().values() if has_tokenizer(tokenizer) else (255,)
    needed = max(FORCED_TOKENS, min(spec.vocab_size, 1 + max(named, default=0)))
    for place, (spec, _) in models.items():
        if spec.vocab_size < needed:
            refuse(f"{place}: a vocabulary of {spec.vocab_size} tokens", f"forced acceptance needs {needed} here")


def _random_model(directory: Path, context: int, has_kernels: bool) -> Model:
    model_folder(directory)
    if not is_llama_family(directory):
        able = ", ".join(FAMILIES)
        name = plain(architecture_of(directory))
        refuse(f"{directory}: no random weights are made for {name}", f"use one of {able}")
    spec = ModelSpec.read(directory)
    if _is_windowed(spec, context):
        refuse(f"{directory}: no random weights are made for windows of {spec.window} tokens", "ask for less --context")
    if spec.experts is not None and not has_kernels:
        refuse(f"{directory}: random weights of experts need the C kernels ({reason()})", "use a model without experts")
    return spec, RandomCheckpoint(spec)


def _model(directory: Path, context: int, has_kernels: bool) -> Model:
    """The model in ``directory``, to be served with at most ``context`` tokens."""
    if not is_llama_family(directory):  # the only case that loads torch: such a model has to be looked at
        return _generic(directory)
    spec = ModelSpec.read(directory)
    if is_gguf_name(directory):
        _refuse_file(directory, spec, context, has_kernels)
    elif _is_windowed(spec, context) or (spec.experts is not None and not has_kernels):
        return _generic(directory)
    return spec, open_weights(directory, spec)


def _refuse_file(path: Path, spec: ModelSpec, context: int, has_kernels: bool) -> None:
    """Refuse a GGUF file that only transformers' code could compute, as it has no directory to be read from."""
    if _is_windowed(spec, context):
        refuse(f"{path}: no GGUF file is decoded with its window of {spec.window} tokens", "ask for less --context")
    if spec.experts is not None and not has_kernels:
        refuse(f"{path}: experts need the C kernels ({reason()})", "use a model without experts")


def _is_windowed(spec: ModelSpec, context: int) -> bool:
    """Whether a sliding window hides a token from another one in ``context`` tokens: LlamaShard has no windows."""
    return spec.window is not None and spec.window < min(context, spec.context)


def _generic(directory: Path) -> Model:
    return GenericSpec.read(directory), Checkpoint(directory, llama=False)


def _refuse_tokenizer(config: Config, spec: ModelSpec | GenericSpec) -> None:
    """A tokenizer that cannot be had from its GGUF file, or one for a larger model than the target."""
    refuse_foreign_tokenizer(config.tokenizer_directory)
    if config.tokenizer is not None and has_tokenizer(config.tokenizer_directory):
        most = max(vocabulary_of(config.tokenizer_directory).values(), default=0)
        if most >= spec.vocab_size:
            problem = f"--tokenizer {config.tokenizer}: it has a token {most}, the target {spec.vocab_size} tokens"
            refuse(problem, "give the target's own")


def _same_vocabulary(target_directory: Path, draft_directory: Path) -> None:
    is_any_file = is_gguf_name(target_directory) or is_gguf_name(draft_directory)
    if not is_any_file and has_tokenizer(target_directory) and same_tokens(target_directory, draft_directory):
        return  # without loading either, as is usual
    target, draft = (vocabulary_of(directory) for directory in (target_directory, draft_directory))
    if target != draft:
        odd = sorted(token for token in target.keys() | draft.keys() if target.get(token) != draft.get(token))
        refuse(
            f"target and draft have different vocabularies ({len(odd)} tokens differ, {odd[0]!r} for one)",
            "use a draft made with the target's tokenizer",
        )
