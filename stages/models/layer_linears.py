"""The linear layers of one decoder layer as the kernels take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stages.kernels.cuts import part_of
from stages.kernels.linear import Linear
from stages.models.linear_sizes import LINEARS
from stages.models.split import Split, down_cuts, output_cuts
from stages.quantization.matrix import stacked


def pack_linear(split: Split, kind: str, read: Mapping[str, Any]) -> Linear:
    """The linear layer ``kind`` of LINEARS, of tensors ``read``, by their names within the layer: the part that
    ``split`` has."""
    modules = LINEARS[kind]
    weights = [read[f"{module}.weight"] for module in modules]
    biases = [read[f"{module}.bias"] for module in modules if f"{module}.bias" in read] or None
    if kind == "gate_up":
        return Linear.interleaved(weights, biases)
    if kind == "qkv":
        return Linear.pack(stacked(weights), None if biases is None else torch.cat(biases))
    cuts = output_cuts(split.spec) if kind == "output" else down_cuts(split.spec)
    return Linear.pack(weights[0], biases[0] if biases else None, part_of(cuts, split.rank, split.size)[1])
