"""FP6 in bit planes, as ``pipeinfer quantize`` writes it (Quant-LLM, ATC'24): floats of sign, 3 bits of exponent and 2
of mantissa.

Of a matrix [outputs, inputs]:

    weight_high   uint8 [outputs, ceil(inputs / 2)]  sign and exponent, 4 bits; the first input in the lowest bits
    weight_low    uint8 [outputs, ceil(inputs / 4)]  mantissa, 2 bits; likewise
    weight_scale  float [outputs, groups]
    weight_shape  int64 [2]                          [outputs, inputs]

    weight[o, i] = weight_scale[o, i // group] e3m2(4 high[o, i] + low[o, i])

In config.json "quant_method" is "pipeinfer-fp6", "format" "e3m2-planes", and "group_size" a number, or null for one
scale an output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Any

from stages.quantization.grid import Grid
from stages.quantization.scheme import SCALE_TYPES, Part, Reader, Shape, covered, quoted, refuse, refuse_group
from stages.quantization.settings import CORRECT, Settings

if TYPE_CHECKING:
    from torch import Tensor

    from stages.quantization.matrix import QuantizedMatrix

METHOD = "pipeinfer-fp6"
FORMAT = "e3m2-planes"
HIGH, LOW, SCALE, SHAPE = "weight_high", "weight_low", "weight_scale", "weight_shape"
PER_BYTE = {HIGH: 2, LOW: 4}
"""Weights a byte of each plane."""


@dataclass(frozen=True, slots=True)
class Fp6Packing:
    """See Packing. ``grid``: of scales."""

    grid: Grid
    early: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """See Packing."""
        return "FP6 in bit planes"

    def shape(self, stored: Mapping[str, Shape], read: Reader) -> tuple[int, int]:
        """See Packing."""
        return stored[HIGH][0], int(read(SHAPE)[1])

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See Packing."""
        planes = {name: Part(("U8",), ((outputs, -(-inputs // per)),)) for name, per in PER_BYTE.items()}
        scales = Part(SCALE_TYPES, self.grid.shapes(outputs, inputs)[:1])
        return {**planes, SCALE: scales, SHAPE: Part(("I64",), ((2,),))}

    def refuse_numbers(self, suffix: str, numbers: Any) -> None:
        """See Packing."""

    def build(self, read: Reader, outputs: int, inputs: int, rows: range, columns: range) -> QuantizedMatrix:
        """See Packing."""
        from stages.quantization.matrix import QuantizedMatrix

        if (shape := read(SHAPE).tolist()) != [outputs, inputs]:
            refuse(f"is {shape}, config.json asks for {[outputs, inputs]}", CORRECT, SHAPE)
        near = covered(columns, lcm(self.grid.columns or 1, *PER_BYTE.values()), inputs)
        codes = self._plane(read, HIGH, rows, near) << 2 | self._plane(read, LOW, rows, near)
        span, scales = self.grid.span(inputs), self.grid.take(read, SCALE, rows, near)
        whole = QuantizedMatrix("fp6", 6, codes, scales, span, span, kind="e3m2")
        return whole[:, columns.start - near.start : columns.stop - near.start]

    def _plane(self, read: Reader, name: str, rows: range, near: range) -> Tensor:
        """Uint8 [rows, near]: the bits of the plane ``name``."""
        from stages.quantization.bit_fields import codes_of

        per = PER_BYTE[name]
        packed = read(name, slice(rows.start, rows.stop), slice(near.start // per, -(-near.stop // per)))
        return codes_of(packed, 8 // per, len(near))


@dataclass(frozen=True, slots=True)
class Fp6Scheme:
    """See Scheme."""

    grid: Grid
    note: str = ""

    def packing(self, module: str, stored: Mapping[str, str]) -> Fp6Packing | None:
        """See Scheme."""
        return Fp6Packing(self.grid) if {HIGH, LOW} & stored.keys() else None


def read_fp6(settings: Settings) -> Fp6Scheme:
    """The scheme of a configuration. Raises SchemeError."""
    form = settings.first("format")
    if form != FORMAT:
        refuse(f"{settings.within}.format {quoted(form)} is not supported", f"use a model in {FORMAT}")
    group = refuse_group(settings.first("group_size", default=-1), f"{settings.within}.group_size")
    return Fp6Scheme(Grid("channel") if group == -1 else Grid("group", columns=group))
