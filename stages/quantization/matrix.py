"""A matrix whose numbers are stored in few bits, in one form for all formats.

Number [o, i] is ``scale * number(code) - minimum``. ``scale`` is that of the block of ``span`` inputs, times the factor
of the group of ``group`` inputs where there are factors (the K formats of GGUF have two levels); the minimum likewise.
Both products are exact in float32 wherever the reference of a format asks for one rounding, so that ``dense`` gives the
bits of gguf's own dequantisation and of the definitions of GPTQ, AWQ and compressed-tensors.

References: GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978), Quant-LLM (ATC'24), FP8 (arXiv:2209.05433).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

SCALES = (torch.float16, torch.bfloat16, torch.float32)
"""What scales and minima are stored as."""
KINDS = ("integer", "e3m2", "e3m0", "e4m3")
"""What codes are: whole numbers from 0 on, minus a zero point; or small floats (sign, exponent, mantissa)."""


def floats_of(kind: str) -> Tensor:
    """The float32 number of each code of the float ``kind``: e3m2 [64], e4m3 [256] with NaN at both ends."""
    exponent_bits, mantissa_bits = int(kind[1]), int(kind[3])
    bias, codes = 2 ** (exponent_bits - 1) - 1, torch.arange(2 ** (1 + exponent_bits + mantissa_bits))
    mantissa, exponent = codes % 2**mantissa_bits, (codes >> mantissa_bits) % 2**exponent_bits
    normal = (1.0 + mantissa.double() / 2**mantissa_bits) * 2.0 ** (exponent.double() - bias)
    size = torch.where(exponent == 0, mantissa.double() / 2**mantissa_bits * 2.0 ** (1 - bias), normal)
    if kind == "e4m3":
        size[codes % 128 == 127] = math.nan
    return torch.where(codes >> (exponent_bits + mantissa_bits) == 1, -size, size).float()


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedMatrix:
    """``codes``: uint8 [outputs, inputs], below 2^bits. ``scales``, of SCALES: [outputs, blocks of span inputs].
    ``factors``: int16 [outputs, groups], or None. ``zeros``: the zero point of all codes, or uint8 [outputs, groups].
    ``minima`` and ``minimum_factors``: as scales and factors. ``group`` divides 32 or is a multiple of it; a row's last
    group and block may be short. ``format``: what users know it as, as in "q4_k" or "int4"."""

    format: str
    bits: int
    codes: Tensor
    scales: Tensor
    group: int
    span: int
    zeros: int | Tensor = 0
    factors: Tensor | None = None
    minima: Tensor | None = None
    minimum_factors: Tensor | None = None
    kind: str = "integer"

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        outputs, inputs = self.codes.shape
        return outputs, inputs

    def __getitem__(self, parts: Any) -> QuantizedMatrix:
        """The part [outputs, inputs] that slices or indices of outputs, and a slice of inputs, name. A cut inside a
        group makes groups smaller."""
        rows, columns = parts if isinstance(parts, tuple) else (parts, slice(None))
        start, stop, _ = (columns if columns is not ... else slice(None)).indices(self.shape[1])
        fine = self._regrouped(math.gcd(start, self.group), math.gcd(start, self.span)) if start else self

        def of(tensor: Tensor | None, size: int) -> Tensor | None:
            return None if tensor is None else tensor[rows, start // size : -(-stop // size)]

        scales, zeros = of(fine.scales, fine.span), fine.zeros
        assert scales is not None
        if isinstance(zeros, Tensor):
            zeros = zeros[rows, start // fine.group : -(-stop // fine.group)]
        return replace(
            fine,
            codes=self.codes[rows, start:stop],
            scales=scales,
            zeros=zeros,
            factors=of(fine.factors, fine.group),
            minima=of(fine.minima, fine.span),
            minimum_factors=of(fine.minimum_factors, fine.group),
        )

    def _regrouped(self, group: int, span: int) -> QuantizedMatrix:
        """The same numbers with smaller groups and spans, divisors of today's."""
        inputs = self.shape[1]

        def again(tensor: Tensor | None, old: int, new: int) -> Tensor | None:
            if tensor is None or old == new:
                return tensor
            return tensor.repeat_interleave(old // new, 1)[:, : -(-inputs // new)]

        scales = again(self.scales, self.span, span)
        assert scales is not None
        zeros = self.zeros if isinstance(self.zeros, int) else again(self.zeros, self.group, group)
        assert zeros is not None
        return replace(
            self,
            group=group,
            span=span,
            scales=scales,
            zeros=zeros,
            factors=again(self.factors, self.group, group),
            minima=again(self.minima, self.span, span),
            minimum_factors=again(self.minimum_factors, self.group, group),
        )

    def dense(self) -> Tensor:
        """float32 [outputs, inputs]."""
        inputs = self.shape[1]

        def spread(tensor: Tensor, size: int) -> Tensor:
            return tensor.float().repeat_interleave(size, 1)[:, :inputs]

        numbers = self.codes.float() if self.kind == "integer" else floats_of(self.kind)[self.codes.int()]
        numbers = numbers - (self.zeros if isinstance(self.zeros, int) else spread(self.zeros, self.group))
        scale = spread(self.scales, self.span)
        if self.factors is not None:
            scale = scale * spread(self.factors, self.group)
        numbers = scale * numbers
        if self.minima is None:
            return numbers
        minimum = spread(self.minima, self.span)
        if self.minimum_factors is not None:
            minimum = minimum * spread(self.minimum_factors, self.group)
        return numbers - minimum

    def is_like(self, other: QuantizedMatrix) -> bool:
        """Whether both can be one quantised matrix."""
        return self._likeness() == other._likeness()

    def _likeness(self) -> tuple[object, ...]:
        has = [tensor is not None for tensor in (self.factors, self.minima, self.minimum_factors)]
        zeros = self.zeros if isinstance(self.zeros, int) else "each"
        return self.kind, self.bits, self.group, self.span, zeros, self.scales.dtype, self.shape[1], *has


Matrix = Tensor | QuantizedMatrix
"""Weights of a linear layer, [outputs, inputs], as a checkpoint stores them."""


def dense(matrix: Matrix) -> Tensor:
    """``matrix`` as a tensor: what is quantised in float32."""
    return matrix if isinstance(matrix, Tensor) else matrix.dense()


def stacked(matrices: Sequence[Matrix]) -> Matrix:
    """One matrix of the outputs of all: in float32 if they are stored in different formats."""
    quantized = [matrix for matrix in matrices if isinstance(matrix, QuantizedMatrix)]
    if len(quantized) == len(matrices) and all(matrix.is_like(quantized[0]) for matrix in quantized):
        return _joined(quantized)
    tensors = [dense(matrix) for matrix in matrices]
    return torch.cat([tensor.float() for tensor in tensors] if quantized else tensors)


def _joined(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    first = matrices[0]

    def of(name: str) -> Any:
        parts = [getattr(matrix, name) for matrix in matrices]
        return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]

    names = ("codes", "scales", "zeros", "factors", "minima", "minimum_factors")
    return replace(first, **{name: of(name) for name in names})
