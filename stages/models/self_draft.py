"""A target that drafts for itself: its own weights in fewer bits, some of its layers, or both.

No second checkpoint is needed, and tokenizers are the same. The drafter reads the target's tensors and rounds each
matrix as it is loaded, one at a time. Norms, biases and routers of experts stay as they are. Ideas: quantised
self-speculation (QuantSpec, arXiv:2502.10424) and skipped layers (Draft & Verify, arXiv:2309.08168).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from pipeinfer.core.errors import refuse
from pipeinfer.core.self_draft import BITS, SelfDraft, read_self_draft
from stages.checkpoint.checkpoint import Weights, dense_tensors, expert_tensors, router_name
from stages.checkpoint.extents import Extent
from stages.checkpoint.spec import FAMILIES, ModelSpec
from stages.models.generic_spec import GenericSpec

if TYPE_CHECKING:
    import torch

    from stages.quantization.matrix import Matrix

SHARES = {"int4": (0.95, 0.85, 0.75)}
"""Scales that are tried, as shares of the largest: loading has to be quick. More of them gain nothing that acceptance
shows, and of other formats one is enough."""
GROUPS = {"int4": 32, "fp6-4": 64}
"""Inputs that share a scale where a name leaves it open and they divide all rows; else whole rows."""
SCALE_BITS = 1
"""What scales and zero points take at most, for each weight."""
Slices = Mapping[str, tuple[slice, ...]]
Round = Callable[["Matrix", "torch.dtype"], "Matrix"]
"""What gives a matrix fewer bits, its scales being of that dtype. Raises ValueError."""


def self_draft(name: str, target: tuple[ModelSpec | GenericSpec, Weights]) -> tuple[ModelSpec, Weights]:
    """The draft ``name`` of ``target``. Reads no weights. Raises UserError for what makes no sense."""
    asked, (spec, weights) = read_self_draft(name), target
    if not isinstance(spec, ModelSpec):
        refuse(f"--draft {name}: no draft is made of a {spec.architecture}", f"use a model of {', '.join(FAMILIES)}")
    count = spec.layer_count
    if asked.layers is not None and asked.layers >= count + bool(asked.format):
        refuse(f"--draft {name}: the target has {count} layers", "ask for fewer, or for a format of fewer bits")
    if asked.format:
        _refuse_no_smaller(name, asked.format, spec, weights)
    kept = asked.kept(count)
    rounding = partial(rounded, format=asked.format, group=_group(name, asked, spec)) if asked.format else None
    return replace(spec, layer_count=len(kept)), SelfDraftWeights(spec, weights, kept, rounding)


def _group(name: str, asked: SelfDraft, spec: ModelSpec) -> int:
    """Inputs that share a scale; 0 for all of an output. Raises UserError for a group that does not divide all rows."""
    inputs = (spec.hidden_size, spec.head_count * spec.head_dim, spec.intermediate_size)
    group = GROUPS.get(asked.format, 0) if asked.group is None else asked.group
    odd = [size for size in inputs if group and size % group]
    if asked.group is None:
        return 0 if odd else group
    if group % 32 or group == 0:
        refuse(f"--draft {name}: groups of {group} inputs", "use a multiple of 32")
    if odd:
        refuse(f"--draft {name}: groups of {group} do not divide rows of {odd[0]} inputs", "use a smaller group")
    return group


def _refuse_no_smaller(name: str, format: str, spec: ModelSpec, weights: Weights) -> None:
    """Refuse a format in which no matrix of the first and the last layer would have fewer bits than it has now, its
    scales included; of experts the first stands for all. What the headers do not tell is not refused."""
    most = 0.0
    for layer in (0, spec.layer_count - 1):
        experts = expert_tensors(spec, layer, 0) if spec.experts is not None else {}
        for tensor, shape in (dense_tensors(spec, layer) | experts).items():
            if len(shape) == 2 and (extents := weights.extents([tensor])):
                most = max(most, 8 * sum(extent.nbytes for extent in extents) / math.prod(shape))
    if 0 < most <= BITS[format] + SCALE_BITS:
        problem = f"--draft {name}: the target has {most:.2g} bits a weight already"
        refuse(problem, "ask for fewer, or for layers=N alone")


def rounded(matrix: Matrix, dtype: torch.dtype, format: str, group: int) -> Matrix:
    """``matrix`` in ``format``, with scales of ``dtype``. What is stored in no more bits stays as it is; of FP6 the
    4-bit plane is that of the codes that are stored."""
    from stages.quantization.matrix import QuantizedMatrix, dense
    from stages.quantization.rounding import FORMATS, PLANE, plane_of, quantize_matrix

    if isinstance(matrix, QuantizedMatrix):
        if matrix.bits <= (4 if format == PLANE else FORMATS[format].bits):
            return matrix
        if format == PLANE and matrix.kind == "e3m2":
            return plane_of(dense(matrix), matrix)
    return quantize_matrix(dense(matrix), format, group, scales=dtype, shares=SHARES.get(format, (1.0,)))


class SelfDraftWeights(Weights):
    """The ``layers`` of the target ``spec``, whose weights are ``weights``, numbered from 0 on; see Weights. ``round``:
    what is done to each matrix; None for nothing."""

    def __init__(self, spec: ModelSpec, weights: Weights, layers: Sequence[int], round: Round | None = None) -> None:
        self._weights, self._layers, self._round = weights, layers, round
        experts = spec.experts
        self._routers = {router_name(experts, layer) for layer in layers} if experts is not None else set()

    def stored_name(self, name: str) -> str:
        """See Weights."""
        return self._weights.stored_name(name)

    def read(self, names: Iterable[str], dtype: torch.dtype, slices: Slices | None = None) -> dict[str, torch.Tensor]:
        """See Weights."""
        from stages.quantization.matrix import dense

        return {name: dense(tensor).to(dtype) for name, tensor in self.matrices(names, dtype, slices).items()}

    def matrices(self, names: Iterable[str], dtype: torch.dtype, slices: Slices | None = None) -> dict[str, Matrix]:
        """See Weights. A matrix is rounded whole, so its numbers do not depend on ``slices``."""
        return {name: self._matrix(name, dtype, slices[name] if slices else ()) for name in names}

    def extents(self, names: Iterable[str], slices: Slices | None = None) -> list[Extent]:
        """See Weights."""
        theirs = {name: self._name_in_target(name) for name in names}
        if slices is None or self._round is not None:
            return self._weights.extents(theirs.values())
        return self._weights.extents(theirs.values(), {theirs[name]: slices[name] for name in theirs})

    def _matrix(self, name: str, dtype: torch.dtype, part: tuple[slice, ...]) -> Matrix:
        """The tensor that the draft calls ``name``, or ``part`` of it."""
        theirs = self._name_in_target(name)
        if self._round is None or theirs in self._routers:
            return self._weights.matrices([theirs], dtype, {theirs: part} if part else None)[theirs]
        tensor = self._weights.matrices([theirs], dtype)[theirs]
        if len(tensor.shape) == 2:
            try:
                tensor = self._round(tensor, dtype)
            except ValueError as error:
                refuse(f"tensor {theirs} cannot be rounded: {error}", "use --draft none, or download the model again")
        return tensor[part + (slice(None),) * (len(tensor.shape) - len(part))] if part else tensor

    def _name_in_target(self, name: str) -> str:
        if not name.startswith("model.layers."):
            return name
        _, _, layer, rest = name.split(".", 3)
        return f"model.layers.{self._layers[int(layer)]}.{rest}"
