"""The linear layers of one decoder layer as the kernels take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.kernels.cuts import are_aligned, part_of
from stages.kernels.library import PANEL
from stages.kernels.linear import Linear
from stages.models.linear_sizes import LINEARS
from stages.models.split import Split, down_cuts, output_cuts
from stages.quantization.matrix import dense, stacked


def pack_linear(split: Split, kind: str, read: Mapping[str, Any]) -> Linear:
    """The linear layer ``kind`` of LINEARS, of tensors ``read``, by their names within the layer: the part that
    ``split`` has."""
    modules = LINEARS[kind]
    weights = [read[f"{module}.weight"] for module in modules]
    biases = [read[f"{module}.bias"] for module in modules if f"{module}.bias" in read] or None
    if kind == "gate_up":
        return Linear.interleaved(weights, biases)
    if kind == "qkv":  # heads of whole panels can have formats of their own: then all ranks have whole panels too
        return Linear.joined(weights if split.spec.head_dim % PANEL == 0 else [stacked(weights)], biases)
    cuts = output_cuts(split.spec) if kind == "output" else down_cuts(split.spec)
    weight = weights[0] if are_aligned(cuts) else dense(weights[0])  # the same on all ranks, whichever cuts they have
    return Linear.pack(weight, biases[0] if biases else None, part_of(cuts, split.rank, split.size)[1])
