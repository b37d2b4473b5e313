"""Floats of 8 bits, e4m3 (arXiv:2209.05433), stored as they are: fp8 as DeepSeek, Qwen and transformers write it,
fbgemm_fp8, and ``float-quantized`` of compressed-tensors.

    weight            F8_E4M3 [outputs, inputs]
    weight_scale_inv  or weight_scale: float, of the tensor, of each output, or of each block, as of [128, 128]

    w[o, i] = scale of (o, i) * weight[o, i]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.quantization.grid import Grid
from stages.quantization.scheme import SCALE_TYPES, Part, Reader, Shape, quoted, refuse, refuse_group
from stages.quantization.settings import CORRECT, Settings

if TYPE_CHECKING:
    from stages.quantization.matrix import QuantizedMatrix

FLOAT8 = "F8_E4M3"
SCALES = ("weight_scale_inv", "weight_scale")
DYNAMIC = "activations are not quantised as config.json says (weights are)"


@dataclass(frozen=True, slots=True)
class Float8Packing:
    """See Packing. ``grids``: those that the scales may have, whose shapes tell them apart; ``scale``: their name."""

    grids: tuple[Grid, ...]
    scale: str
    early: tuple[str, ...] = ()
    format: str = "fp8 (e4m3)"

    def shape(self, stored: Mapping[str, Shape], read: Reader) -> tuple[int, int]:
        """See Packing."""
        outputs, inputs = stored["weight"]
        return outputs, inputs

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See Packing."""
        shapes = tuple(shape for grid in self.grids for shape in grid.shapes(outputs, inputs))
        return {"weight": Part((FLOAT8,), ((outputs, inputs),)), self.scale: Part(SCALE_TYPES, shapes)}

    def refuse_numbers(self, suffix: str, numbers: Any) -> None:
        """See Packing."""

    def build(self, read: Reader, outputs: int, inputs: int, rows: range, columns: range) -> QuantizedMatrix:
        """See Packing."""
        import torch

        from stages.quantization.matrix import QuantizedMatrix

        stored = read.shape(self.scale)
        grid = next(grid for grid in self.grids if stored in grid.shapes(outputs, inputs))
        near, span = grid.near(columns, inputs), grid.span(inputs)
        codes = read("weight", slice(rows.start, rows.stop), slice(near.start, near.stop)).view(torch.uint8)
        if bool(((codes & 127) == 127).any()):
            refuse("has numbers that are not finite (NaN)", "download or export the model again", "weight")
        whole = QuantizedMatrix("fp8", 8, codes, grid.take(read, self.scale, rows, near), span, span, kind="e4m3")
        return whole[:, columns.start - near.start : columns.stop - near.start]


@dataclass(frozen=True, slots=True)
class Float8Scheme:
    """See Scheme."""

    grids: tuple[Grid, ...]
    note: str = ""

    def packing(self, module: str, stored: Mapping[str, str]) -> Float8Packing | None:
        """See Scheme."""
        if not stored.get("weight", "").startswith("F8"):
            return None
        if stored["weight"] != FLOAT8:
            refuse(f"is {stored['weight']}", f"use a release in {FLOAT8}", "weight")
        return Float8Packing(self.grids, next((name for name in SCALES if name in stored), SCALES[0]))


def read_float8(settings: Settings) -> Float8Scheme:
    """What ``settings`` say of a checkpoint of quant_method fp8 or fbgemm_fp8. Raises SchemeError."""
    kind = settings.first("fmt", "weight_format", default="e4m3")
    if kind not in ("e4m3", "float8_e4m3fn"):
        refuse(f"{settings.within}.fmt {quoted(kind)} is not supported", "use a release in e4m3")
    block = settings.first("weight_block_size")
    grids: tuple[Grid, ...] = (Grid("tensor"), Grid("channel"))
    if block is not None:
        if not isinstance(block, list) or len(block) != 2 or type(block[0]) is not int or block[0] < 1:
            refuse(f"{settings.within}.weight_block_size must be two numbers, not {quoted(block)}", CORRECT)
        columns = refuse_group(block[1], f"{settings.within}.weight_block_size")
        grids = (Grid("channel") if columns == -1 else Grid("block", block[0], columns),)
    scheme = settings.first("activation_scheme", default="none")
    return Float8Scheme(grids, "" if scheme == "none" else DYNAMIC)
