"""What a quantisation method says of a checkpoint's tensors: which of them make a matrix, and how.

A Scheme follows from the model's configuration alone. For a module, as "model.layers.3.mlp.up_proj", it names the
Packing of its weight: the stored tensors with their shapes and types, and how a part of the matrix is read from them.
Nothing here imports torch: a bad checkpoint is refused from its headers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from stages.quantization.matrix import QuantizedMatrix

SCALE_TYPES = ("F16", "BF16", "F32")
"""What scales are stored as, in safetensors' spelling."""
MOST_QUOTED = 40
ANOTHER = "use a GPTQ, AWQ, compressed-tensors or fp8 release, or `pipeinfer quantize` on the bfloat16 one"


class SchemeError(Exception):
    """A quantisation that is not supported, or that contradicts itself. ``tensor``: the suffix of the stored tensor at
    fault; empty where it is the configuration."""

    def __init__(self, thing: str, fix: str, tensor: str = "") -> None:
        super().__init__(thing)
        self.thing, self.fix, self.tensor = thing, fix, tensor


def refuse(thing: str, fix: str = ANOTHER, tensor: str = "") -> NoReturn:
    """Raise SchemeError."""
    raise SchemeError(thing, fix, tensor)


def quoted(value: object) -> str:
    """A value of a configuration, short enough for a message."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nests without end
        text = f"a {type(value).__name__}"
    return text if len(text) <= MOST_QUOTED else f"{text[: MOST_QUOTED - 4]} ..."


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a matrix: its possible types, in safetensors' spelling, and its possible shapes."""

    types: tuple[str, ...]
    shapes: tuple[Shape, ...]
    is_optional: bool = False


class Reader(Protocol):
    """Reads a part of a matrix's stored tensors."""

    def __call__(self, suffix: str, *index: slice) -> Tensor:
        """The part ``index`` of the tensor ``suffix``, in memory of its own. Raises where scales are not finite."""
        ...

    def has(self, suffix: str) -> bool:
        """Whether that tensor is stored."""
        ...

    def type(self, suffix: str) -> str:
        """Its type, in safetensors' spelling."""
        ...

    def shape(self, suffix: str) -> Shape:
        """Its shape."""
        ...


class Packing(Protocol):
    """How the weight of one module is stored."""

    @property
    def format(self) -> str:
        """What users know it as, as "GPTQ of 4 bits"."""
        ...

    @property
    def early(self) -> tuple[str, ...]:
        """Suffixes of small tensors whose numbers ``refuse_numbers`` judges before anything is loaded."""
        ...

    def shape(self, stored: Mapping[str, Shape], read: Reader) -> tuple[int, int]:
        """Outputs and inputs, by the shapes of what is stored, or by numbers where those do not say."""
        ...

    def parts(self, outputs: int, inputs: int) -> dict[str, Part]:
        """What must be stored for a matrix of that shape, by suffix."""
        ...

    def refuse_numbers(self, suffix: str, numbers: Any) -> None:
        """Raise SchemeError for the numbers of one of ``early``, an array."""
        ...

    def build(self, read: Reader, outputs: int, inputs: int, rows: range, columns: range) -> QuantizedMatrix:
        """The part [rows, columns] of the matrix. Raises SchemeError."""
        ...


class Scheme(Protocol):
    """What a model's configuration says of its weights."""

    @property
    def note(self) -> str:
        """What of the configuration is not followed, in one line; empty for nothing."""
        ...

    def packing(self, module: str, stored: Mapping[str, str]) -> Packing | None:
        """How the weight of ``module`` is stored; None where it is an ordinary tensor. ``stored``: types of its
        tensors by suffix. Raises SchemeError where those and the configuration contradict each other."""
        ...


def words(count: int, bits: int, is_stream: bool = False) -> int:
    """32-bit words that hold ``count`` codes: each whole in one word or, with ``is_stream``, one after another."""
    return -(-count // 32) * bits if is_stream else -(-count // (32 // bits))


def covered(part: range, unit: int, total: int) -> range:
    """The whole units of ``unit`` numbers, of ``total`` numbers, that have ``part``."""
    return range(part.start // unit * unit, min(total, -(-part.stop // unit) * unit))


def whole_group(inputs: int) -> int:
    """A group that all ``inputs`` are in, as QuantizedMatrix wants it: a multiple of 32."""
    return -(-inputs // 32) * 32


def refuse_group(group: object, what: str = "group_size") -> int:
    """``group``, a size of groups that QuantizedMatrix can have, or -1 for all inputs. Raises SchemeError."""
    if type(group) is int and (group == -1 or (group > 0 and (group % 32 == 0 or 32 % group == 0))):
        return group
    refuse(f"{what} {quoted(group)} is not supported", "use groups of a multiple of 32, or -1 for one of all inputs")
