"""Linear layers of the C library: packed weights."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stages.kernels.arena import Arena
from stages.kernels.cuts import BLOCK, default_cuts, even_cuts
from stages.kernels.library import LEAVES, PANEL, CLinear, Library, library
from stages.kernels.packing import CODES, CPacking, can_pack, normal, packing_of, parts_of
from stages.quantization.matrix import Matrix, QuantizedMatrix, dense, stacked

FORMATS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Numbers of the formats of native/kernels.h."""
DOT = 3
"""The format of bfloat16 weights that are multiplied by pairs of bfloat16."""

QUANTIZED = 4
"""The format of quantised weights."""

ARENA = Arena()


def padded(count: int) -> int:
    """``count`` rounded up to whole panels."""
    return -(-count // PANEL) * PANEL


class Linear:
    """y = x W^T + bias with packed weights. Use ``pack``; ``c`` is what kernels are given, as long as this lives."""

    def __init__(
        self,
        lib: Library,
        packed: Tensor,
        bias: Tensor | None,
        outputs: int,
        inputs: int,
        cuts: Sequence[int],
        packing: CPacking | None = None,
    ) -> None:
        self.lib, self.packed, self.bias, self.outputs, self.inputs = lib, packed, bias, outputs, inputs
        self.packing, self.following = packing, list[Linear]()
        kind, is_integer = QUANTIZED if packing else FORMATS[packed.dtype], False
        if packed.dtype == torch.bfloat16 and lib.numerics == "fast" and lib.kernels.has_dot:
            kind = DOT
        if packing is not None:
            is_integer = lib.activations == "int8" and packing.kind == CODES["integer"]
        address = bias.data_ptr() if bias is not None else None
        self.c = CLinear(
            packed.data_ptr(),
            address,
            None if packing is None else ctypes.addressof(packing),
            None,
            kind,
            outputs,
            inputs,
            (ctypes.c_int32 * (LEAVES + 1))(*cuts),
            padded(outputs) // PANEL,
            is_integer,
        )

    @classmethod
    def pack(cls, weight: Matrix, bias: Tensor | None = None, cuts: Sequence[int] | None = None) -> Linear:
        """Of ``weight`` [outputs, inputs], bfloat16, float16, float32 or quantised, and ``bias`` [outputs]."""
        return cls.interleaved([weight], None if bias is None else [bias], cuts)

    @classmethod
    def interleaved(
        cls, weights: Sequence[Matrix], biases: Sequence[Tensor] | None = None, cuts: Sequence[int] | None = None
    ) -> Linear:
        """Of several ``weights`` [outputs, inputs] of one shape, whose panels of 16 outputs take turns. What is
        quantised becomes float32 where kernels do not have it: formats that differ, and those of ``can_pack``."""
        lib = library()
        assert lib is not None, "there is no library of kernels"
        outputs, inputs = weights[0].shape
        turns = len(weights)
        bias = torch.zeros(padded(outputs) * turns) if biases is not None else None
        for turn, given in enumerate(biases or ()):
            assert bias is not None
            _fill(bias.view(-1, turns, PANEL)[:, turn], given)
        total = outputs if turns == 1 else padded(outputs) * turns
        if matrices := _packable(weights, cuts):
            packed, packing = _pack_quantized(lib, matrices)
            return cls(lib, packed, bias, total, inputs, cuts or even_cuts(inputs, BLOCK), packing)
        tensors = [dense(weight) for weight in weights]
        if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
            tensors = [tensor.float() for tensor in tensors]
        packed = _pack_dense(lib, tensors)
        return cls(lib, packed, bias, total, inputs, cuts or default_cuts(inputs))

    @classmethod
    def joined(cls, weights: Sequence[Matrix], biases: Sequence[Tensor] | None = None) -> Linear:
        """Of the outputs of all ``weights`` [outputs, inputs], each in its own format where all but the last have whole
        panels of outputs, else in one."""
        bias = None if biases is None else torch.cat(list(biases))
        rest = sum(weight.shape[0] % PANEL for weight in weights[:-1])
        if rest or not any(isinstance(weight, QuantizedMatrix) for weight in weights):
            return cls.pack(stacked(weights), bias)
        runs: list[list[Matrix]] = []
        for weight in weights:
            if runs and _are_alike(runs[-1][0], weight):
                runs[-1].append(weight)
            else:
                runs.append([weight])
        inputs, outputs = weights[0].shape[1], sum(weight.shape[0] for weight in weights)
        parts = [cls.pack(stacked(run), None, even_cuts(inputs, BLOCK)) for run in runs]
        for part, following in pairwise(parts):
            part.c.next = ctypes.addressof(following.c)
        first = parts[0]
        first.following = parts[1:]
        if bias is not None:
            first.bias = torch.zeros(padded(outputs))
            first.bias[:outputs] = bias
            first.c.bias = first.bias.data_ptr()
        first.outputs = first.c.columns = outputs
        return first

    @property
    def held(self) -> list[Tensor]:
        """The packed weights."""
        return [part.packed for part in (self, *self.following)]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(tensor.nbytes for tensor in self.held)

    def __call__(self, x: Tensor) -> Tensor:
        """``x``: float32 [rows, inputs]; returns float32 [rows, outputs]."""
        rows = x.shape[0]
        if self.inputs % 2 or x.stride() != (self.inputs, 1):
            x = torch.nn.functional.pad(x, (0, self.inputs % 2)).contiguous()
        y = torch.empty((rows, padded(self.outputs)))
        self.lib.kernels.linear(ctypes.addressof(self.c), x.data_ptr(), x.shape[1], rows, y.data_ptr(), y.shape[1])
        return y[:, : self.outputs]


def _pack_dense(lib: Library, weights: Sequence[Tensor]) -> Tensor:
    """The panels of ``weights``, of one dtype, which take turns: [outputs, inputs], padded."""
    (outputs, inputs), turns = weights[0].shape, len(weights)
    packed = ARENA.empty(lib, (padded(outputs) * turns, -(-inputs // 2) * 2), weights[0].dtype)
    for turn, weight in enumerate(weights):
        source = weight.contiguous()
        numbers = FORMATS[source.dtype], outputs, inputs, turn, turns
        lib.binary.pipeinfer_pack(source.data_ptr(), *numbers, packed.data_ptr())
    return packed


def _are_alike(one: Matrix, other: Matrix) -> bool:
    """Whether both can be stored as one matrix without a change of format."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and one.dtype == other.dtype
    return one.is_like(other)


def _packable(weights: Sequence[Matrix], cuts: Sequence[int] | None) -> list[QuantizedMatrix]:
    """``weights`` if the kernels of quantised weights can take them, else nothing."""
    matrices = [normal(weight) for weight in weights if isinstance(weight, QuantizedMatrix)]
    if not matrices or len(matrices) < len(weights):
        return []
    inputs = matrices[0].shape[1]
    is_aligned = all(cut % BLOCK == 0 or cut == inputs for cut in cuts or ())
    is_one = all(matrix.is_like(matrices[0]) for matrix in matrices)
    return matrices if is_aligned and is_one and all(map(can_pack, matrices)) else []


def _pack_quantized(lib: Library, matrices: Sequence[QuantizedMatrix]) -> tuple[Tensor, CPacking]:
    """The panels of ``matrices``, which take turns: uint8 [panels, bytes]; and how they lie there."""
    (outputs, inputs), turns, packing = matrices[0].shape, len(matrices), packing_of(matrices[0])
    packed = ARENA.empty(lib, (padded(outputs) // PANEL * turns, packing.panel_nbytes), torch.uint8)
    for turn, matrix in enumerate(matrices):
        parts, held = parts_of(matrix)
        given = ctypes.addressof(packing), ctypes.addressof(parts)
        lib.binary.pipeinfer_pack_quantized(*given, outputs, inputs, turn, turns, packed.data_ptr())
        del held
    return packed, packing


def _fill(panels: Tensor, bias: Tensor) -> None:
    """Write ``bias`` [outputs] into ``panels`` [panels, 16], which has zeros beyond."""
    whole = torch.zeros(panels.numel())
    whole[: len(bias)] = bias
    panels.copy_(whole.view(-1, PANEL))
