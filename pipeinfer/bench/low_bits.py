"""Random quantised matrices, for measuring: what their numbers are makes no difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.quantization.matrix import QuantizedMatrix


@dataclass(frozen=True, slots=True)
class Layout:
    """``group`` and ``span``: inputs, 0 for whole rows. ``levels``: 1, or 2 for integer factors of groups beside the
    scales of spans. ``is_asymmetric``: with minima, or with a zero point of each group where there is one level."""

    bits: int
    group: int
    span: int
    levels: int = 1
    is_asymmetric: bool = False
    kind: str = "integer"


LAYOUTS = {
    "int8": Layout(8, 0, 0),
    "q8_0": Layout(8, 32, 32),
    "int4-32": Layout(4, 32, 32),
    "int4-128": Layout(4, 128, 128),
    "awq-128": Layout(4, 128, 128, is_asymmetric=True),
    "q3_k": Layout(3, 16, 256, 2),
    "q4_k": Layout(4, 32, 256, 2, is_asymmetric=True),
    "q5_k": Layout(5, 32, 256, 2, is_asymmetric=True),
    "q6_k": Layout(6, 16, 256, 2),
    "fp6": Layout(6, 128, 128, kind="e3m2"),
    "fp6-4": Layout(4, 64, 64, kind="e3m0"),
    "fp8": Layout(8, 128, 128, kind="e4m3"),
}
"""The formats of users by name; GPTQ with zero points is as awq."""


def random_matrix(form: str, outputs: int, inputs: int) -> QuantizedMatrix:
    """A matrix [outputs, inputs] in a format of LAYOUTS; torch's generator gives its numbers."""
    import torch

    from stages.quantization.matrix import QuantizedMatrix

    layout = LAYOUTS[form]
    group, span = layout.group or -(-inputs // 32) * 32, layout.span or -(-inputs // 32) * 32
    groups, spans = -(-inputs // group), -(-inputs // span)
    codes = torch.randint(0, 100 if layout.kind == "e4m3" else 2**layout.bits, (outputs, inputs), dtype=torch.uint8)
    scales = (torch.rand(outputs, spans) / 2**layout.bits / inputs**0.5).half()
    factors = torch.randint(1, 64, (outputs, groups), dtype=torch.int16)
    is_two, has_zeros = layout.levels == 2, layout.is_asymmetric and layout.levels == 1
    has_minima = layout.is_asymmetric and is_two
    middle = 2 ** (layout.bits - 1) if layout.kind == "integer" and not has_minima else 0
    return QuantizedMatrix(
        form,
        layout.bits,
        codes,
        scales,
        group,
        span,
        torch.full((outputs, groups), middle, dtype=torch.uint8) if has_zeros else middle,
        factors if is_two else None,
        scales if has_minima else None,
        factors if has_minima else None,
        layout.kind,
    )
