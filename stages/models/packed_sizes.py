"""Bytes of packed linear layers whose weights are quantised: found by packing one panel of each matrix."""

from __future__ import annotations

import torch

from stages.checkpoint.checkpoint import Weights
from stages.kernels.library import PANEL
from stages.models.layer_linears import pack_linear
from stages.models.linear_sizes import linear_shape, module_outputs, panels, weight_names, within_layer
from stages.models.split import Split


def sampled_nbytes(weights: Weights, split: Split, layer: int, kind: str, dtype: torch.dtype) -> int:
    """Bytes of the linear layer ``kind`` of ``layer``, the part that ``split`` has. ``weights``: of the whole model.
    Each matrix is taken to be alike in all of its rows."""
    names = weight_names(layer, kind)
    slices = {name: _first_panel(split.slices(name)) for name in names}
    read = within_layer(weights.matrices(names, dtype, slices))
    packed = pack_linear(split, kind, read)
    outputs = [module_outputs(split, module) for module in (name.split(".")[-2] for name in names)]
    if kind != "qkv":  # all its matrices have as many outputs
        return packed.nbytes // len(names) * sum(panels(count) // PANEL for count in outputs)
    if len(packed.held) < len(names):  # one format for all
        return packed.nbytes // len(names) * panels(linear_shape(split, kind)[0]) // PANEL
    return sum(tensor.nbytes * panels(count) // PANEL for tensor, count in zip(packed.held, outputs, strict=True))


def _first_panel(part: tuple[slice, ...]) -> tuple[slice, ...]:
    """The first rows of ``part``."""
    start, stop = part[0].start or 0, part[0].stop
    end = start + PANEL if stop is None else min(stop, start + PANEL)
    return slice(start, end), *part[1:]
