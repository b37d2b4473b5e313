"""GPTQ as AutoGPTQ, GPTQModel and transformers write it (arXiv:2210.17323).

Of a matrix [outputs, inputs], B bits, groups of G inputs:

    qweight  int32 [inputs B / 32, outputs]    codes of one output, one after another, also across words (3 bits)
    qzeros   int32 [groups, outputs B / 32]    zero points of one group; in format "gptq" stored minus one, modulo 2^B
    scales   float [groups, outputs]
    g_idx    int32 [inputs]                    the group of each input

    weight[o, i] = scales[g, o] (code[o, i] - zero[g, o]),  g = g_idx[i]

Groups must be consecutive inputs. With ``desc_act`` they usually are not, so g_idx is read before anything is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
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
    words,
)
from stages.quantization.settings import Settings, compiled

if TYPE_CHECKING:
    from torch import Tensor

    from stages.quantization.matrix import QuantizedMatrix

FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What is added to a stored zero point, by ``checkpoint_format``."""


@dataclass(frozen=True, slots=True)
class GptqPacking:
    """See Packing. ``group``: -1 for one of all inputs. ``is_sorted``: desc_act, inputs sorted by their activations
    when they were quantised."""

    bits: int
    group: int
    is_symmetric: bool
    is_sorted: bool
    zero_offset: int

    @property
    def format(self) -> str:
        """See Packing."""
        return f"GPTQ of {self.bits} bits"

    @property
    def early(self) -> tuple[str, ...]:
        """See Packing."""
        return ("g_idx",) if self.is_sorted else ()

    @property
    def _is_stream(self) -> bool:
        return 32 % self.bits != 0

    def shape(self, stored: Mapping[str, Shape], read: Reader) -> tuple[int, int]:
        """See Packing."""
        count, outputs = stored["qweight"]
        inputs = stored["g_idx"][0] if "g_idx" in stored else count * 32 // self.bits
        return outputs, inputs

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """See Packing."""
        groups = -(-inputs // self._size(inputs))
        count, wide = (words(size, self.bits, self._is_stream) for size in (inputs, outputs))
        return {
            "qweight": Part(("I32",), ((count, outputs),)),
            "qzeros": Part(("I32",), ((groups, wide),)),
            "scales": Part(SCALE_TYPES, ((groups, outputs),)),
            "g_idx": Part(("I32", "I64"), ((inputs,),), is_optional=True),
        }

    def refuse_numbers(self, suffix: str, numbers: Any) -> None:
        """See Packing; ``numbers``: of g_idx."""
        group = self._size(len(numbers))
        if numbers.tolist() != [place // group for place in range(len(numbers))]:
            refuse(
                "has inputs out of their order (desc_act, act-order), which is not supported",
                "use a release with desc_act false, or an AWQ or GGUF release",
                suffix,
            )

    def build(self, read: Reader, outputs: int, inputs: int, rows: range, columns: range) -> QuantizedMatrix:
        """See Packing."""
        from stages.quantization.matrix import QuantizedMatrix
        from stages.quantization.unpack import unpacked

        group = self._size(inputs)
        near = covered(columns, 32 if self.group == -1 else lcm(32, group), inputs)
        if read.has("g_idx"):
            self._refuse_order(read("g_idx", slice(near.start, near.stop)), near, group)
        first = near.start * self.bits // 32
        counted = slice(first, first + words(len(near), self.bits, self._is_stream))
        codes = unpacked(read("qweight", counted, _slice(rows)).T, self.bits, self._is_stream)[:, : len(near)]
        groups = slice(near.start // group, -(-near.stop // group))
        scales = read("scales", groups, _slice(rows)).T.contiguous()
        zeros = self._zeros(read, groups, rows, outputs)
        whole = QuantizedMatrix(f"int{self.bits}", self.bits, codes, scales, group, group, zeros)
        return whole[:, columns.start - near.start : columns.stop - near.start]

    def _size(self, inputs: int) -> int:
        return whole_group(inputs) if self.group == -1 else self.group

    def _refuse_order(self, order: Tensor, near: range, group: int) -> None:
        self.refuse_numbers("g_idx", order - near.start // group)

    def _zeros(self, read: Reader, groups: slice, rows: range, outputs: int) -> int | Tensor:
        from stages.quantization.unpack import one_or_each, unpacked

        near = covered(rows, 32, outputs)
        first = near.start * self.bits // 32
        packed = read("qzeros", groups, slice(first, first + words(len(near), self.bits, self._is_stream)))
        stored = unpacked(packed, self.bits, self._is_stream)[:, rows.start - near.start : rows.stop - near.start]
        each = ((stored.int() + self.zero_offset) & ((1 << self.bits) - 1)).byte().T.contiguous()
        zeros = one_or_each(each, self.is_symmetric, self.bits)
        if zeros is None:
            refuse(
                f"has zero points other than {1 << (self.bits - 1)}, but config.json says sym",
                "correct sym or checkpoint_format, or export the model again",
                "qzeros",
            )
        return zeros


@dataclass(frozen=True, slots=True)
class GptqScheme:
    """See Scheme. ``others``: GPTQModel's ``dynamic``, how modules that a pattern matches are packed, None: not."""

    usual: GptqPacking
    others: tuple[tuple[re.Pattern[str], GptqPacking | None], ...] = ()
    note: str = ""

    def packing(self, module: str, stored: Mapping[str, str]) -> GptqPacking | None:
        """See Scheme."""
        if "qweight" not in stored:
            return None
        found = next((packing for pattern, packing in self.others if pattern.match(module)), self.usual)
        if found is None:
            refuse("is packed, but config.json excludes its module (dynamic)", "export the model again", "qweight")
        return found


def read_gptq(settings: Settings) -> GptqScheme:
    """What ``settings`` say of a GPTQ checkpoint. Raises SchemeError."""
    name = str(settings.first("checkpoint_format", "format", default="gptq")).lower()
    if settings.flag("is_marlin_format"):
        name = "marlin"
    if name not in FORMATS:
        refuse(f"checkpoint_format {quoted(name)} of GPTQ is not supported", "use a release of format gptq or gptq_v2")
    kind = settings.first("pack_dtype", default="int32")
    if kind != "int32":
        refuse(f"pack_dtype {quoted(kind)} of GPTQ is not supported", "use a release that is packed in int32")
    usual = _packing(settings, FORMATS[name])
    dynamic = settings.inner("dynamic")
    others: list[tuple[re.Pattern[str], GptqPacking | None]] = []
    for pattern, changed in (dynamic.content if dynamic else {}).items():
        expression = compiled(pattern.removeprefix("+:").removeprefix("-:"), f"{settings.within}.dynamic")
        if pattern.startswith("-:"):
            others.append((expression, None))
        else:
            inner = Settings(changed, f"{settings.within}.dynamic")
            both = Settings({**settings.content, **inner.content}, inner.within)
            others.append((expression, _packing(both, FORMATS[name])))
    return GptqScheme(usual, tuple(others))


def _packing(settings: Settings, zero_offset: int) -> GptqPacking:
    bits = settings.bits("bits", among=(2, 3, 4, 8))
    group = refuse_group(settings.first("group_size", default=-1), f"{settings.within}.group_size")
    return GptqPacking(bits, group, settings.flag("sym"), settings.flag("desc_act"), zero_offset)


def _slice(part: range) -> slice:
    return slice(part.start, part.stop)
