"""The configuration of a job; every rank builds the same one from the same values."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeinfer.core.errors import refuse
from pipeinfer.core.self_draft import is_self_draft
from pipeinfer.core.wire import VERSION

ModelName = str | os.PathLike[str]
BUILTIN = "builtin"
NONE = "none"
DTYPES = ("fp32", "bf16", "fp16")
AUTO = "auto"
"""The dtype of a job whose weights are held as their checkpoints store them."""
STORED_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
NUMERICS = ("portable", "fast")
ACTIVATIONS = ("fp32", "int8")
FUSED = ("auto", "on", "off")
UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}
"""Powers of 1024 by their letters."""


@dataclass(frozen=True, slots=True)
class Config:
    """``target`` and ``drafts`` (one for each drafter) are directories in Hugging Face format, GGUF files, or
    ``builtin``; a draft may also be made of the target (see core.self_draft). ``tokenizer``: a directory with the
    tokenizer of all of them; None for the target's own.
    ``policy``: every knob of it, by name (see speculation.schedules.policy). ``context``: most tokens of a request,
    prompt included (0: what the target was made for, at most DEFAULT_CONTEXT). ``timeout_s``: how long nothing may
    move before the job gives up and reports who waits for whom (0: for ever). ``trace``: the prefix of each rank's
    trace file (see pipeinfer.runtime.trace); None for no traces. ``calibrations``: what is known of each source's
    probabilities (see speculation.trees.calibration). ``forced_acceptance``: the probabilities with which a draft's
    first choice, its second and so on are to be right, whatever the models compute (stages.models.forced); nothing for
    the models' own tokens.
    ``random_weights``: the directories' weights are not read but made up (see stages.checkpoint.random_weights).
    ``dtype``: of weights; ``auto`` until preflight knows what the target's checkpoint says. ``draft_dtypes``: what
    preflight resolved for each draft; until then as ``dtype``. ``numerics``: ``portable`` for the same bits on every
    processor, ``fast`` for those of this one. ``activations``: what quantised weights with integer codes are multiplied
    by, of ACTIVATIONS. ``threads``: of each rank; None for its fair share of the cores.
    ``tp``: ranks that share a stage; ``stages``: how many there are to be, if that is said. ``fused``: whether their
    exchanges are fused with the kernels, of FUSED. ``max_num_seqs``: requests that are decoded at once. ``kv_memory``:
    bytes of each rank for keys and values of accepted tokens, 0 for what so many whole contexts need; ``kv_slots``: the
    slots that preflight found for it. ``weights_memory``: bytes of each rank for the target's weights, with buffers for
    those that are streamed from the files; 0 where all are resident. ``prefix_caching``: whether what requests have
    computed is kept for others that begin with the same tokens."""

    target: str = BUILTIN
    drafts: tuple[str, ...] = (BUILTIN,)
    policy: dict[str, Any] = field(default_factory=lambda: {"name": "plain", "speculate": False})
    dtype: str = AUTO
    context: int = 0
    timeout_s: float = 120.0
    trace: str | None = None
    calibrations: dict[str, dict[str, Any]] = field(default_factory=dict)
    forced_acceptance: tuple[float, ...] = ()
    random_weights: bool = False
    numerics: str = NUMERICS[0]
    activations: str = ACTIVATIONS[0]
    threads: int | None = None
    draft_dtypes: tuple[str, ...] = ()
    tp: int = 1
    stages: int | None = None
    fused: str = "auto"
    max_num_seqs: int = 1
    kv_memory: int = 0
    kv_slots: int = 0
    weights_memory: int = 0
    prefix_caching: bool = False
    tokenizer: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """What ``dataclasses.asdict`` made of one, JSON in between or not."""
        lists = ("drafts", "forced_acceptance", "draft_dtypes")
        return cls(**{**values, **{name: tuple(values[name]) for name in lists if name in values}})

    def digest(self) -> int:
        """A number that ranks compare at HELLO: they must mean the same job and speak the same protocol. Where a rank
        writes its trace and how many threads it has are its own affair."""
        job = {name: value for name, value in asdict(self).items() if name not in ("trace", "threads")}
        return zlib.crc32(json.dumps([VERSION, job], sort_keys=True).encode())

    @property
    def target_directory(self) -> Path:
        """Where the target's files are, or its GGUF file."""
        return model_directory(self.target, "target")

    @property
    def tokenizer_directory(self) -> Path:
        """The directory or the GGUF file that has the tokenizer."""
        return self.target_directory if self.tokenizer is None else Path(model_name(self.tokenizer, "tokenizer"))

    @property
    def draft_directories(self) -> list[Path]:
        """Where the drafts' files are, drafter by drafter; those of drafts made of the target are the target's."""
        target = self.target_directory
        return [target if is_self_draft(name) else model_directory(name, "draft") for name in self.drafts]


def byte_count(size: int | str, what: str) -> int:
    """A number of bytes, said as a number or as in ``8G`` (K, M, G and T are powers of 1024). ``what``: whose option it
    is. Raises UserError."""
    text = str(size).strip().upper().removesuffix("B").removesuffix("I")
    unit = UNITS.get(text[-1:], 0)
    try:
        count = float(text[:-1] if unit else text) * 1024**unit
    except ValueError:
        count = -1.0
    if not 0 <= count < 2**63:
        refuse(f"{what} {size}", "give bytes, as in 500M or 8G")
    return int(count)


def resolve_dtype(asked: str, stored: str | None, has_kernels: bool) -> str:
    """In which of DTYPES a model's weights are held that was ``asked`` for as one of them or as AUTO. ``stored``: what
    its checkpoint says, as "bfloat16". Without the kernel library only fp32 gives equal tokens at any number of rows,
    so weights of 16 bits are then held in fp32."""
    if asked != AUTO:
        return asked
    return STORED_DTYPES.get(stored or "", "fp32") if has_kernels else "fp32"


DEFAULT_CONTEXT = 4096
"""Most tokens of a request unless ``context`` is larger: slots for a whole long context are paid for even if unused."""


def model_name(name: object, part: str) -> str:
    """A directory that a program gave as text or as a path. ``part``: ``target``, ``draft`` or ``tokenizer``. Raises
    UserError."""
    if not isinstance(name, (str, bytes, os.PathLike)):
        refuse(f"the {part} is a {type(name).__name__}", "give its directory as text or as a path")
    given = os.fsdecode(name)
    if not given.strip():
        refuse(f"the name of the {part}'s directory is empty", "give a local directory in Hugging Face layout")
    return given


def model_directory(name: str, part: str) -> Path:
    """The directory or the GGUF file that ``name`` means; ``part`` is ``target`` or ``draft``."""
    return Path(__file__).parents[1] / BUILTIN / part if name == BUILTIN else Path(model_name(name, part))


def draft_names(
    target: str | os.PathLike[str], draft: ModelName | Sequence[ModelName] | None, drafters: int | None
) -> tuple[str, ...]:
    """The draft of each drafter. ``draft``: one for all, one for each, or ``none``; the built-in target brings its own.

    Raises UserError where their number and ``drafters`` do not fit."""
    given = () if draft is None else draft if isinstance(draft, (list, tuple)) else (draft,)
    names = [model_name(name, "draft") for name in given]
    if names == [NONE]:
        names = []
    elif not names and target == BUILTIN:
        names = [BUILTIN]
    if drafters is None:
        return tuple(names)
    if drafters < 1:
        refuse(f"{drafters} drafters", f"use at least one, or --draft {NONE}")
    if not names:
        refuse(f"{drafters} drafters without a draft model", "name one with --draft DIR")
    if len(names) not in (1, drafters):
        refuse(f"{len(names)} draft models for {drafters} drafters", "name one for all or one for each")
    return tuple(names * drafters if len(names) == 1 else names)
