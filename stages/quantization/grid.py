"""Which numbers of a matrix share a scale, where a checkpoint stores scales by outputs: compressed-tensors and fp8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stages.quantization.scheme import Reader, Shape, covered, whole_group

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Grid:
    """``strategy``: one scale for the whole tensor, for each output (channel), for each output's groups of ``columns``
    inputs, or for each block of [rows, columns]."""

    strategy: Literal["tensor", "channel", "group", "block"]
    rows: int = 1
    columns: int = 0

    def span(self, inputs: int) -> int:
        """How many inputs share a scale, as QuantizedMatrix has it."""
        return self.columns or whole_group(inputs)

    def near(self, columns: range, inputs: int) -> range:
        """The inputs of the whole groups that have ``columns``."""
        return covered(columns, self.columns, inputs) if self.columns else columns

    def shapes(self, outputs: int, inputs: int) -> tuple[Shape, ...]:
        """Possible shapes of the scales of a matrix [outputs, inputs]."""
        if self.strategy == "tensor":
            return (1,), (), (1, 1)
        if self.strategy == "channel":
            return (outputs, 1), (outputs,)
        return ((-(-outputs // self.rows), -(-inputs // self.columns)),)

    def take(self, read: Reader, suffix: str, rows: range, near: range) -> Tensor:
        """The scales [rows, groups of ``near``] in the tensor ``suffix``; ``near``: see there."""
        if self.strategy == "tensor":
            return read(suffix).reshape(1, 1).expand(len(rows), 1).contiguous()
        if self.strategy == "channel":
            return read(suffix, slice(rows.start, rows.stop)).reshape(-1, 1)
        first = rows.start // self.rows
        groups = slice(near.start // self.columns, -(-near.stop // self.columns))
        scales = read(suffix, slice(first, -(-rows.stop // self.rows)), groups)
        start = rows.start - first * self.rows
        return scales.repeat_interleave(self.rows, 0)[start : start + len(rows)].contiguous()
