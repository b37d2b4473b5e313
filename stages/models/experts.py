"""The experts of some consecutive layers on the C kernels (stages/kernels/native/moe.h).

A router chooses some experts for each row. Each expert's weights are read once for all rows that have it. A row's
outputs are added in a fixed order, its best expert first, so a row has the same bits in any company."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import addressof
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.checkpoint.checkpoint import Weights, expert_tensors, router_name
from stages.checkpoint.spec import ExpertSpec, ModelSpec
from stages.kernels.group import Group
from stages.kernels.library import PHASES, CExperts, CLinear, CRoutes, CRows
from stages.kernels.linear import Linear, padded
from stages.quantization.matrix import Matrix

READ_NBYTES = 256 << 20
"""Experts are read so many bytes at a time: a file is opened for each time."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer: what the kernels are given, and what it points to. ``experts``: gate and up together, and down."""

    c: CExperts
    router: Linear
    experts: list[tuple[Linear, Linear]]
    arrays: tuple[object, object]


class _Scratch:
    """Memory of a pass of up to ``rows`` rows."""

    def __init__(self, spec: ModelSpec, experts: ExpertSpec, rows: int) -> None:
        self.rows, outputs = rows, rows * experts.chosen
        hidden = padded(spec.hidden_size)
        places = torch.zeros((2, outputs), dtype=torch.int32)
        by_expert = torch.zeros((2, experts.count + 2), dtype=torch.int32)
        self._held = (
            torch.zeros((rows, padded(experts.count))),
            torch.zeros(outputs),
            *places,
            *by_expert,
            torch.zeros((outputs, hidden)),
            torch.zeros((outputs, padded(spec.intermediate_size))),
            torch.zeros((outputs, hidden)),
        )
        self.c = CRoutes(*[tensor.data_ptr() for tensor in self._held])


class Experts:
    """The routers and experts of a shard's layers, and the memory of a pass through one of them. Use ``load``."""

    def __init__(self, spec: ModelSpec, experts: ExpertSpec, layers: list[_Layer]) -> None:
        self._spec, self._experts, self._layers = spec, experts, layers
        self._scratch = _Scratch(spec, experts, 1)

    @classmethod
    def load(
        cls, spec: ModelSpec, checkpoint: Weights, layers: range, dtype: torch.dtype, rank: int = 0, size: int = 1
    ) -> Experts | None:
        """Read the routers, in float32, and the experts of ``layers`` that rank ``rank`` of ``size`` has: whole ones.
        None for a model without. Raises CheckpointError."""
        if spec.experts is None:
            return None
        mine = range(spec.experts.count * rank // size, spec.experts.count * (rank + 1) // size)
        read = [_load_layer(spec, spec.experts, checkpoint, layer, dtype, mine) for layer in layers]
        return cls(spec, spec.experts, read)

    @property
    def packed(self) -> list[Tensor]:
        """The weights."""
        linears = [linear for layer in self._layers for pair in layer.experts for linear in pair]
        linears += [layer.router for layer in self._layers]
        return [tensor for linear in linears for tensor in linear.held]

    def run(self, layer: int, model: int, rows: CRows, group: Group | None = None) -> None:
        """What follows attention in the ``layer``-th layer here: add to ``rows.x`` what experts make of
        ``rows.normed``. ``model``: where the kernels find their ``struct model``. ``group``: of ranks that have the
        other experts."""
        if rows.count > self._scratch.rows:
            self._scratch = _Scratch(self._spec, self._experts, rows.count)
        here = self._layers[layer]
        given = model, addressof(here.c), addressof(self._scratch.c), addressof(rows)
        run, rows.first, rows.end = here.router.lib.kernels.experts, 0, PHASES
        if group is None or group.is_fused:
            run(*given)
            if group is not None:
                group.exchanges["fused"] += 1
                group.check()
            return
        parts = torch.zeros(group.size, rows.count * self._experts.chosen * padded(self._spec.hidden_size))
        rows.parts = parts.data_ptr()
        rows.end = 1
        run(*given)
        group.bring(parts.numpy())
        rows.first, rows.end = 1, PHASES
        run(*given)
        rows.parts = None


def _load_layer(
    spec: ModelSpec, experts: ExpertSpec, checkpoint: Weights, layer: int, dtype: torch.dtype, mine: range
) -> _Layer:
    """The router and the experts ``mine`` of a layer."""
    name = router_name(experts, layer)
    router = Linear.pack(checkpoint.read([name], torch.float32)[name])
    pairs = [
        (Linear.interleaved([gate, up]), Linear.pack(down))
        for gate, up, down in _read_experts(spec, checkpoint, layer, dtype, mine)
    ]
    gate_up, down = ((CLinear * len(mine))(*[pair[side].c for pair in pairs]) for side in (0, 1))
    sizes = experts.count, mine.start, mine.stop, experts.chosen, experts.is_normalised
    c = CExperts(addressof(router.c), addressof(gate_up), addressof(down), *sizes)
    return _Layer(c, router, pairs, (gate_up, down))


def _read_experts(
    spec: ModelSpec, checkpoint: Weights, layer: int, dtype: torch.dtype, mine: range
) -> Iterator[list[Matrix]]:
    """The matrices of each of the experts ``mine`` of a layer: gate, up and down."""
    nbytes = 3 * spec.hidden_size * spec.intermediate_size * dtype.itemsize
    step = max(1, READ_NBYTES // nbytes)
    for first in range(mine.start, mine.stop, step):
        names = [[*expert_tensors(spec, layer, e)] for e in range(first, min(first + step, mine.stop))]
        read = checkpoint.matrices([name for three in names for name in three], dtype)
        for three in names:
            yield [read.pop(name) for name in three]
