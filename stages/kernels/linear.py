"""Linear layers of the C library: packed weights."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from stages.kernels.arena import Arena
from stages.kernels.cuts import default_cuts
from stages.kernels.library import LEAVES, PANEL, CLinear, Library, library
from stages.quantization.matrix import Matrix, dense

FORMATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Numbers of the formats of native/kernels.h."""
DOT = 3
"""The format of bfloat16 weights that are multiplied by pairs of bfloat16."""

ARENA = Arena()


def padded(count: int) -> int:
    """``count`` rounded up to whole panels."""
    return -(-count // PANEL) * PANEL


class Linear:
    """y = x W^T + bias with packed weights. Use ``pack``; ``c`` is what kernels are given, as long as this lives."""

    def __init__(
        self, lib: Library, packed: Tensor, bias: Tensor | None, outputs: int, inputs: int, cuts: Sequence[int]
    ) -> None:
        self.lib, self.packed, self.bias, self.outputs, self.inputs = lib, packed, bias, outputs, inputs
        kind = FORMATS[packed.dtype]
        if packed.dtype == torch.bfloat16 and lib.numerics == "fast" and lib.kernels.has_dot:
            kind = DOT
        address = bias.data_ptr() if bias is not None else None
        self.c = CLinear(packed.data_ptr(), address, kind, outputs, inputs, (ctypes.c_int32 * (LEAVES + 1))(*cuts))

    @classmethod
    def pack(cls, weight: Matrix, bias: Tensor | None = None, cuts: Sequence[int] | None = None) -> Linear:
        """Of ``weight`` [outputs, inputs], bfloat16, float16, float32 or quantised, and ``bias`` [outputs]."""
        return cls.interleaved([weight], None if bias is None else [bias], cuts)

    @classmethod
    def interleaved(
        cls, weights: Sequence[Matrix], biases: Sequence[Tensor] | None = None, cuts: Sequence[int] | None = None
    ) -> Linear:
        """Of several ``weights`` [outputs, inputs] of one shape, whose panels of 16 outputs take turns."""
        lib = library()
        assert lib is not None, "there is no library of kernels"
        outputs, inputs = weights[0].shape
        turns, pairs = len(weights), -(-inputs // 2)
        tensors = [dense(weight) for weight in weights]
        packed = ARENA.empty(lib, (padded(outputs) * turns, 2 * pairs), tensors[0].dtype)
        bias = torch.zeros(padded(outputs) * turns) if biases is not None else None
        for turn, weight in enumerate(tensors):
            source = weight.contiguous()
            numbers = FORMATS[source.dtype], outputs, inputs, turn, turns
            lib.binary.pipeinfer_pack(source.data_ptr(), *numbers, packed.data_ptr())
            if bias is not None and biases is not None:
                _fill(bias.view(-1, turns, PANEL)[:, turn], biases[turn])
        total = outputs if turns == 1 else padded(outputs) * turns
        return cls(lib, packed, bias, total, inputs, cuts or default_cuts(inputs))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return self.packed.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """``x``: float32 [rows, inputs]; returns float32 [rows, outputs]."""
        rows = x.shape[0]
        if self.inputs % 2 or x.stride() != (self.inputs, 1):
            x = torch.nn.functional.pad(x, (0, self.inputs % 2)).contiguous()
        y = torch.empty((rows, padded(self.outputs)))
        self.lib.kernels.linear(ctypes.addressof(self.c), x.data_ptr(), x.shape[1], rows, y.data_ptr(), y.shape[1])
        return y[:, : self.outputs]


def _fill(panels: Tensor, bias: Tensor) -> None:
    """Write ``bias`` [outputs] into ``panels`` [panels, 16], which has zeros beyond."""
    whole = torch.zeros(panels.numel())
    whole[: len(bias)] = bias
    panels.copy_(whole.view(-1, PANEL))
