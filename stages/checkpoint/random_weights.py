"""Weights for a model of which only ``config.json`` is here: random numbers that follow from the tensors' names.

Each rank makes those of its own layers, so that a model of any size can be measured on the machines meant for it before
anybody has downloaded it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from stages.checkpoint.checkpoint import EMBEDDING, HEAD, Weights, expected_tensors, layer_tensors
from stages.checkpoint.spec import ModelSpec

if TYPE_CHECKING:
    import torch


class RandomCheckpoint(Weights):
    """Takes the place of a Checkpoint (see Weights) for a model of the Llama family."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._ends = expected_tensors(replace(spec, layer_count=0))

    def stored_name(self, name: str) -> str:
        """See Weights: a tied model has no head of its own."""
        return EMBEDDING if name == HEAD and HEAD not in self._ends else name

    def read(
        self, names: Iterable[str], dtype: torch.dtype, slices: Mapping[str, tuple[slice, ...]] | None = None
    ) -> dict[str, torch.Tensor]:
        """See Weights."""
        whole = {name: random_tensor(name, self._shape(name), dtype) for name in names}
        return {name: tensor[slices[name]].clone() for name, tensor in whole.items()} if slices else whole

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self._ends:
            return self._ends[name]
        return layer_tensors(self._spec, int(name.split(".")[2]))[name]


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uniform numbers, always the same ones for a name and a shape: in a matrix such that what it is applied to keeps
    its variance, in a vector (a norm or a bias) from 0.5 to 1.5. So activations stay finite and normal at any depth."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bound = math.sqrt(3 / shape[-1])
    low, high = (0.5, 1.5) if len(shape) == 1 else (-bound, bound)
    return torch.empty(shape).uniform_(low, high, generator=generator).to(dtype)
