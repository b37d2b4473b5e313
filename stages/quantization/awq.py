"""AWQ in the layout of AutoAWQ's GEMM kernels (arXiv:2306.00978).

Of a matrix [outputs, inputs], 4 bits, groups of G inputs:

    qweight  int32 [inputs, outputs / 8]    place p of word w has output 8 w + ORDER[p]
    qzeros   int32 [groups, outputs / 8]    in the same order
    scales   float [groups, outputs]

    weight[o, i] = scales[g, o] (code[o, i] - zero[g, o]),  g = i // G
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.quantization.scheme import (
    SCALE_TYPES,
    Part,
    Reader,
    Shape,
    covered,
    quoted,
    refuse,
    refuse_group,
    whole_group,
)
from stages.quantization.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from stages.quantization.matrix import QuantizedMatrix

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of the 8 outputs of a word, which one each place has, from its lowest bits on."""
PLACES = [ORDER.index(output) for output in range(8)]


@dataclass(frozen=True, slots=True)
class AwqPacking:
    """See Packing. ``group``: -1 for one of all inputs."""

    group: int
    is_symmetric: bool
    early: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """See Packing."""
        return f"AWQ of {BITS} bits"

    def shape(self, stored: Mapping[str, Shape], read: Reader) -> tuple[int, int]:
        """See Packing."""
        return stored["scales"][-1], stored["qweight"][0]

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See Packing."""
        groups, wide = -(-inputs // self._size(inputs)), -(-outputs // 8)
        return {
            "qweight": Part(("I32",), ((inputs, wide),)),
            "qzeros": Part(("I32",), ((groups, wide),), is_optional=self.is_symmetric),
            "scales": Part(SCALE_TYPES, ((groups, outputs),)),
        }

    def refuse_numbers(self, suffix: str, numbers: Any) -> None:
        """See Packing."""

    def build(self, read: Reader, outputs: int, inputs: int, rows: range, columns: range) -> QuantizedMatrix:
        """See Packing."""
        from stages.quantization.matrix import QuantizedMatrix

        group = self._size(inputs)
        near = columns if self.group == -1 else covered(columns, group, inputs)
        codes = _ordered(read, "qweight", slice(near.start, near.stop), rows, outputs)
        groups = slice(near.start // group, -(-near.stop // group))
        scales = read("scales", groups, slice(rows.start, rows.stop)).T.contiguous()
        zeros: int | Tensor = 1 << (BITS - 1)
        if read.has("qzeros"):
            zeros = self._zeros(_ordered(read, "qzeros", groups, rows, outputs))
        whole = QuantizedMatrix(f"int{BITS}", BITS, codes, scales, group, group, zeros)
        return whole[:, columns.start - near.start : columns.stop - near.start]

    def _size(self, inputs: int) -> int:
        return whole_group(inputs) if self.group == -1 else self.group

    def _zeros(self, each: Tensor) -> int | Tensor:
        from stages.quantization.unpack import one_or_each

        zeros = one_or_each(each, self.is_symmetric, BITS)
        if zeros is None:
            refuse(
                f"has zero points other than {1 << (BITS - 1)}, but config.json says zero_point false",
                "correct zero_point, or export the model again",
                "qzeros",
            )
        return zeros


def _ordered(read: Reader, suffix: str, across: slice, rows: range, outputs: int) -> Tensor:
    """The codes [rows, across] of a tensor [all, outputs / 8]."""
    from stages.quantization.unpack import unpacked

    near = covered(rows, 8, outputs)
    codes = unpacked(read(suffix, across, slice(near.start // 8, -(-near.stop // 8))), BITS)
    codes = codes.view(len(codes), -1, 8)[..., PLACES].flatten(-2)
    return codes[:, rows.start - near.start : rows.stop - near.start].T.contiguous()


@dataclass(frozen=True, slots=True)
class AwqScheme:
    """See Scheme. ``plain``: names of modules, or whole parts of them, that are not quantised."""

    usual: AwqPacking
    plain: tuple[str, ...] = ()
    note: str = ""

    def packing(self, module: str, stored: Mapping[str, str]) -> AwqPacking | None:
        """See Scheme."""
        if "qweight" not in stored:
            return None
        if any(f".{name}." in f".{module}." for name in self.plain):
            fix = "correct modules_to_not_convert, or export the model again"
            refuse("is packed, but config.json excludes its module (modules_to_not_convert)", fix, "qweight")
        return self.usual


def read_awq(settings: Settings) -> AwqScheme:
    """What ``settings`` say of an AWQ checkpoint. Raises SchemeError."""
    version = str(settings.first("version", "format", "checkpoint_format", default="gemm")).lower()
    if version != "gemm":
        refuse(f"version {quoted(version)} of AWQ is not supported", "use a release of version gemm")
    settings.bits("bits", "w_bit", among=(BITS,))
    group = refuse_group(settings.first("group_size", "q_group_size", default=128), f"{settings.within}.group_size")
    # What GPTQModel writes has sym instead.
    is_symmetric = not settings.flag("zero_point", not settings.flag("sym"))
    return AwqScheme(AwqPacking(group, is_symmetric), settings.texts("modules_to_not_convert"))
