"""Rounding of a matrix to few bits: to the nearest code, with the scales that give the least squared error.

A block of ``group`` weights w of an output shares a scale s: w = s * number(code). Codes are symmetric: integers from
-2^(bits - 1) to 2^(bits - 1) - 1 (as in compressed-tensors), or floats e3m2 (FP6, Quant-LLM). The largest weight of the
block gives the first scale. Smaller scales cut the largest weights off and represent all others more finely. A grid of
such scales is tried, then the scale that is best for the codes found (least squares), and the best of all is taken. An
error may be weighed by the mean square of each input (``importance``), as in AWQ (arXiv:2306.00978).

Scales are rounded to the type that they are stored in before codes are chosen, so their rounding is not an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stages.quantization.matrix import SCALES, QuantizedMatrix, floats_of

MULTIPLE = 32
"""Groups are multiples of so many inputs."""
CHUNK = 1 << 19
"""Weights that are rounded at a time: temporary tensors stay in the caches, and memory is bounded."""
E3M2_TOP, E3M2_LEAST = 28.0, -2
"""The largest number of e3m2, and the exponent of the smallest that is not subnormal."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a format rounds. ``bits`` of a code; ``kind`` as in QuantizedMatrix; the largest weight of a block is stored
    as ``top``; ``shares`` of that first scale are tried."""

    bits: int
    kind: str
    top: float
    shares: tuple[float, ...]

    @property
    def zero(self) -> int:
        """The code of 0."""
        return 1 << (self.bits - 1) if self.kind == "integer" else 0

    def nearest(self, weights: Tensor) -> Tensor:
        """The numbers of this format, float32, that are nearest to ``weights``; of two the even one."""
        if self.kind == "integer":
            return weights.round().clamp_(-self.zero, self.zero - 1)
        exponents = torch.frexp(weights)[1].clamp_(min=E3M2_LEAST + 1)  # weights = mantissa in [0.5, 1) * 2^exponent
        return torch.ldexp(torch.ldexp(weights, 3 - exponents).round_(), exponents - 3).clamp_(-E3M2_TOP, E3M2_TOP)

    def codes(self, numbers: Tensor) -> Tensor:
        """uint8 codes of ``numbers`` of this format."""
        if self.kind == "integer":
            return (numbers + self.zero).to(torch.uint8)
        ascending = floats_of(self.kind)[: 1 << (self.bits - 1)]
        return torch.searchsorted(ascending, numbers.abs()).to(torch.uint8) | (
            (numbers < 0).to(torch.uint8) << (self.bits - 1)
        )


def _shares(count: int, least: float) -> tuple[float, ...]:
    return tuple(1 - (1 - least) * step / (count - 1) for step in range(count))


FORMATS = {
    "int8": Rounding(8, "integer", 127, _shares(4, 0.97)),
    "int4": Rounding(4, "integer", 7, _shares(16, 0.55)),
    "fp6": Rounding(6, "e3m2", E3M2_TOP, _shares(8, 0.65)),
}
PLANE = "fp6-4"
"""FP6 without its mantissas: the 4-bit plane, sign and exponent (e3m0), with scales of its own."""


def quantize_matrix(
    weight: Tensor,
    format: str,
    group: int = 0,
    importance: Tensor | None = None,
    scales: torch.dtype | None = None,
    shares: Sequence[float] = (),
) -> QuantizedMatrix:
    """``weight`` [outputs, inputs] in ``format``: one of FORMATS, or PLANE. ``group``: inputs that share a scale, a
    multiple of MULTIPLE that divides the inputs; 0: all inputs of an output. ``importance``: float32 [inputs], of
    squared errors. ``scales``: the type of the scales; by default that of ``weight``. ``shares``: those that are
    tried instead of the format's own, where time is short.

    Raises ValueError where ``group`` does not fit, or a weight is not finite."""
    if format == PLANE:
        return plane_of(weight, quantize_matrix(weight, "fp6", group, importance, scales, shares), importance)
    rounding, (outputs, inputs) = FORMATS[format], weight.shape
    if shares:
        rounding = replace(rounding, shares=tuple(shares))
    if group % MULTIPLE or (group and inputs % group):
        raise ValueError(f"groups of {group} do not divide {inputs} inputs, or are no multiple of {MULTIPLE}")
    stored = scales or weight.dtype
    assert stored in SCALES, stored
    size = group or inputs
    codes = torch.empty((outputs, inputs), dtype=torch.uint8)
    found = torch.empty((outputs, inputs // size), dtype=stored)
    parts = None if importance is None else importance.float().view(-1, size)
    rows = max(1, CHUNK // inputs)
    for start in range(0, outputs, rows):
        blocks = weight[start : start + rows].float().view(-1, inputs // size, size)
        if not blocks.isfinite().all():
            raise ValueError("a weight is not finite")
        best, numbers = _best(blocks, rounding, parts, stored)
        found[start : start + rows] = best
        codes[start : start + rows] = rounding.codes(numbers).view(-1, inputs)
    span = -(-size // MULTIPLE) * MULTIPLE
    return QuantizedMatrix(format, rounding.bits, codes, found, span, span, rounding.zero, kind=rounding.kind)


def _best(
    blocks: Tensor, rounding: Rounding, importance: Tensor | None, stored: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The scales [rows, blocks] of type ``stored`` with the least error, and the numbers of ``blocks`` by them."""
    first = blocks.abs().amax(2) / rounding.top
    first[first == 0] = 1
    best, least = _stored(first, stored), torch.full_like(first, torch.inf)
    numbers, units = torch.empty_like(blocks), blocks / first[..., None]  # whose squares are not too large for float32

    def consider(tried: Tensor) -> None:
        tried_numbers = rounding.nearest(blocks / tried[..., None])
        errors = torch.addcmul(units, (tried / first)[..., None], tried_numbers, value=-1).square_()
        error = (errors if importance is None else errors.mul_(importance)).sum(2)
        better = error < least
        best[better], least[better], numbers[better] = tried[better], error[better], tried_numbers[better]

    for share in rounding.shares:
        consider(_stored(first * share, stored))
    ratios = _least_squares(units, numbers, best / first, importance)
    consider(_stored(first * ratios, stored))
    return best.to(stored), numbers


def _stored(scales: Tensor, stored: torch.dtype) -> Tensor:
    """``scales`` rounded to the type ``stored``, but not to 0."""
    return scales.to(stored).clamp_min(torch.finfo(stored).smallest_normal).float()


def _least_squares(blocks: Tensor, numbers: Tensor, otherwise: Tensor, importance: Tensor | None) -> Tensor:
    """The scales by which ``numbers`` are nearest to ``blocks``: sum(w n) / sum(n n); ``otherwise`` without numbers."""
    weighed = numbers if importance is None else numbers * importance
    below = (weighed * numbers).sum(2)
    scales = (weighed * blocks).sum(2) / below
    return torch.where((below > 0) & (scales > 0), scales, otherwise)


def plane_of(weight: Tensor, whole: QuantizedMatrix, importance: Tensor | None = None) -> QuantizedMatrix:
    """The 4-bit plane of the FP6 matrix ``whole``, with the scales by which it is nearest to ``weight``."""
    codes, inputs = whole.codes >> 2, weight.shape[1]
    blocks = whole.scales.shape[1]
    parts = None if importance is None else importance.float().view(blocks, -1)
    scales, rows = torch.empty_like(whole.scales), max(1, CHUNK // inputs)
    table = floats_of("e3m0")
    for start in range(0, len(codes), rows):
        some = slice(start, start + rows)
        numbers = table[codes[some].int()].view(-1, blocks, inputs // blocks)
        wanted = weight[some].float().view_as(numbers)
        before = whole.scales[some].float()
        ratios = _least_squares(wanted / before[..., None], numbers, torch.ones_like(before), parts)
        scales[some] = _stored(before * ratios, scales.dtype).to(scales.dtype)
    return QuantizedMatrix(PLANE, 4, codes, scales, whole.group, whole.span, kind="e3m0")

