"""compressed-tensors, as llm-compressor writes it: formats pack-quantized, int-quantized and float-quantized.

Of a matrix [outputs, inputs] of B bits, with signed codes q from -2^(B-1) on:

    weight_packed      int32 [outputs, inputs / (32 // B)]    q + 2^(B-1), whole codes in a word  (pack-quantized)
    weight             int8 [outputs, inputs]                 q                                   (int-quantized)
    weight             F8_E4M3 [outputs, inputs]              see float8.py                       (float-quantized)
    weight_scale       float, by the strategy: [1], [outputs, 1], [outputs, groups] or of blocks
    weight_zero_point  of asymmetric ones, as the scales in int8; or, packed, int32 [outputs / (32 // B), groups]
    weight_shape       [outputs, inputs]                                                          (pack-quantized)

    w[o, i] = weight_scale[o, g] (q[o, i] - weight_zero_point[o, g])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Any

from stages.quantization.grid import Grid
from stages.quantization.scheme import SCALE_TYPES, Part, Reader, Shape, covered, refuse, words

if TYPE_CHECKING:
    from torch import Tensor

    from stages.quantization.matrix import QuantizedMatrix

AGAIN = "download or export the model again"
SCALE, ZERO = "weight_scale", "weight_zero_point"


@dataclass(frozen=True, slots=True)
class IntegerPacking:
    """See Packing. ``is_packed``: as in pack-quantized, else int-quantized."""

    bits: int
    grid: Grid
    is_symmetric: bool
    is_packed: bool
    early: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """See Packing."""
        return f"compressed-tensors of {self.bits} bits"

    @property
    def _per_word(self) -> int:
        return 32 // self.bits

    def shape(self, stored: Mapping[str, Shape], read: Reader) -> tuple[int, int]:
        """See Packing."""
        if not self.is_packed:
            return stored["weight"][0], stored["weight"][1]
        return stored["weight_packed"][0], int(read("weight_shape")[1])

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See Packing."""
        scales = self.grid.shapes(outputs, inputs)
        zeros: tuple[Shape, ...] = scales
        types: tuple[str, ...] = ("I8",)
        if self.is_packed:
            groups = 1 if self.grid.strategy != "group" else scales[0][1]
            zeros, types = (*scales, (words(outputs, self.bits), groups)), ("I8", "I32")
        found = {
            SCALE: Part(SCALE_TYPES, scales),
            ZERO: Part(types, zeros, is_optional=self.is_symmetric),
        }
        if not self.is_packed:
            return {"weight": Part(("I8",), ((outputs, inputs),)), **found}
        packed = Part(("I32",), ((outputs, words(inputs, self.bits)),))
        return {"weight_packed": packed, "weight_shape": Part(("I64", "I32"), ((2,),)), **found}

    def refuse_numbers(self, suffix: str, numbers: Any) -> None:
        """See Packing."""

    def build(self, read: Reader, outputs: int, inputs: int, rows: range, columns: range) -> QuantizedMatrix:
        """See Packing."""
        from stages.quantization.matrix import QuantizedMatrix

        if self.is_packed and (shape := read("weight_shape").tolist()) != [outputs, inputs]:
            refuse(f"is {shape}, config.json asks for {[outputs, inputs]}", AGAIN, "weight_shape")
        unit = lcm(self.grid.columns or 1, self._per_word if self.is_packed else 1)
        near, span = covered(columns, unit, inputs), self.grid.span(inputs)
        codes = self._codes(read, rows, near)
        scales = self.grid.take(read, SCALE, rows, near)
        zeros = self._zeros(read, outputs, rows, near)
        bits = self.bits if self.is_packed else 8
        whole = QuantizedMatrix(f"int{self.bits}", bits, codes, scales, span, span, zeros)
        return whole[:, columns.start - near.start : columns.stop - near.start]

    def _codes(self, read: Reader, rows: range, near: range) -> Tensor:
        """Uint8 [rows, near]."""
        import torch

        from stages.quantization.unpack import unpacked

        part = slice(rows.start, rows.stop)
        if not self.is_packed:
            return read("weight", part, slice(near.start, near.stop)).view(torch.uint8) ^ 128
        counted = slice(near.start // self._per_word, -(-near.stop // self._per_word))
        return unpacked(read("weight_packed", part, counted), self.bits)[:, : len(near)]

    def _zeros(self, read: Reader, outputs: int, rows: range, near: range) -> int | Tensor:
        """Zero points of codes from 0 on: one for all, or uint8 [rows, groups of near]."""
        import torch

        from stages.quantization.unpack import one_or_each, unpacked

        bits = self.bits if self.is_packed else 8
        if not read.has(ZERO):
            return 1 << (bits - 1)
        if read.type(ZERO) == "I8":
            each = (self.grid.take(read, ZERO, rows, near).int() + (1 << (bits - 1))).to(torch.uint8)
        else:
            whole = covered(rows, self._per_word, outputs)
            group = self.grid.columns
            groups = slice(near.start // group, -(-near.stop // group)) if group else slice(0, 1)
            counted = slice(whole.start // self._per_word, -(-whole.stop // self._per_word))
            codes = unpacked(read(ZERO, counted, groups).T, bits).T
            each = codes[rows.start - whole.start : rows.stop - whole.start].contiguous()
        zeros = one_or_each(each, self.is_symmetric, bits)
        if zeros is None:
            refuse("has numbers other than 0, but config.json says symmetric", "correct symmetric", ZERO)
        return zeros
