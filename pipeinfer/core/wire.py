"""The wire format: the bytes of each kind of message.

    envelope  magic:u16 version:u8 kind:u8 source:u16 dest:u16 txn:u32 payload_nbytes:u32
    body      the fields of the kind's class in order; of each list its length as u16, then the lists one after another

All numbers are little-endian. ``LAYOUTS`` is the table from kind to class. At most one tensor goes with a message:
behind its bytes where it is small, else out of band. Nothing is ever pickled.

Three channels carry messages. STREAM is ordered per pair of roles; on it ``txn`` grows by one. TENSOR is ordered too:
the n-th tensor that a pair moves there belongs to its n-th message that announces one and does not bring it. CONTROL
may overtake, repeat or lose: what travels there is advice, so that losing it costs time and never a token.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from typing import Any

from pipeinfer.core.errors import LocalProtocolError, RemoteProtocolError
from pipeinfer.core.messages import (
    MAX_BIASES,
    MAX_GRAMMAR,
    MAX_OPS,
    MAX_ROWS,
    MAX_TOP,
    Advance,
    Body,
    Calibrate,
    Cancel,
    Cancelled,
    Close,
    Credit,
    DraftNode,
    DraftOrder,
    Failed,
    Hello,
    Message,
    Nodes,
    Probe,
    Prompt,
    Result,
    ResultRow,
    Row,
    Run,
    Settings,
    Shutdown,
    SlotOp,
    SlotOpKind,
    Status,
    TokenBias,
    TopToken,
    Wants,
)

MAGIC = 0x4950
VERSION = 6
ENVELOPE = struct.Struct("<HBBHHII")


@dataclass(frozen=True)
class Items:
    """A list in a body: the struct of an item, what makes one of its numbers, and the most of them."""

    item: struct.Struct
    make: Callable[..., Any] | None  # None: plain numbers
    most: int = MAX_ROWS

    def read(self, data: bytes | memoryview) -> tuple[Any, ...]:
        """The items in ``data``."""
        found = self.item.iter_unpack(data)
        return tuple(starmap(self.make, found)) if self.make else tuple(number for (number,) in found)

    def restore(self, stored: Iterable[Any]) -> tuple[Any, ...]:
        """The items whose fields were ``stored`` as lists."""
        return tuple(starmap(self.make, stored)) if self.make else tuple(stored)


@dataclass(frozen=True)
class Layout:
    """How the bodies of one kind are laid out. ``enums``: fields that are members of an enumeration, by their place."""

    code: int
    kind: type[Any]
    fixed: struct.Struct  # the fields that are numbers, then the length of each list
    lists: tuple[Items, ...] = ()
    enums: Mapping[int, type[enum.IntEnum]] = field(default_factory=dict)
    check: Callable[[Any], bool] | None = None  # whether the lists of a body fit together
    numbers: int = 0  # how many fields come before the lists

    @property
    def max_nbytes(self) -> int:
        """The most bytes that a body takes."""
        return self.fixed.size + sum(items.item.size * items.most for items in self.lists)

    def make(self, numbers: Sequence[Any], lists: Iterable[tuple[Any, ...]]) -> Any:
        """A body of this kind; raises ValueError for numbers that are none of it."""
        values = list(numbers)
        for place, members in self.enums.items():
            values[place] = members(values[place])
        body = self.kind(*values, *lists)
        if self.check and not self.check(body):
            raise ValueError(f"the lists of a {self.kind.__name__} do not fit together")
        return body

    def nbytes(self, body: Any) -> int:
        """How many bytes ``body`` takes."""
        size = self.fixed.size
        for items, found in zip(self.lists, body[self.numbers :], strict=True):
            size += items.item.size * len(found)
        return size


def _layout(
    code: int,
    kind: type[Any],
    fixed: str,
    *lists: Items,
    enums: Mapping[int, type[enum.IntEnum]] | None = None,
    check: Callable[[Any], bool] | None = None,
) -> Layout:
    numbers = len(kind._fields) - len(lists)
    return Layout(code, kind, struct.Struct("<" + fixed + "H" * len(lists)), lists, enums or {}, check, numbers)


OP_KINDS: Mapping[int, SlotOpKind] = {int(kind): kind for kind in SlotOpKind}


def _slot_op(kind: int, slot: int, length: int, position: int, sequence: int) -> SlotOp:
    if kind not in OP_KINDS:
        raise ValueError(f"{kind} is not a valid SlotOpKind")
    return SlotOp(OP_KINDS[kind], slot, length, position, sequence)


OPS = Items(struct.Struct("<BIHIIx"), _slot_op, MAX_OPS)
ROWS = Items(struct.Struct("<iIIII"), Row)
RESULTS = Items(struct.Struct("<iIIfIB"), ResultRow)
TOP = Items(struct.Struct("<if"), TopToken, MAX_ROWS * MAX_TOP)
NODES = Items(struct.Struct("<iIIf"), DraftNode)
CANCELLED = Items(struct.Struct("<III"), Cancelled)
TOKENS = Items(struct.Struct("<i"), None)
OFFSETS = Items(struct.Struct("<f"), None)
BIASES = Items(struct.Struct("<if"), TokenBias, MAX_BIASES)
GRAMMAR = Items(struct.Struct("<B"), None, MAX_GRAMMAR)


def _has_its_tops(result: Result) -> bool:
    counts = [row.top_count for row in result.rows]
    return sum(counts) == len(result.top) and max(counts, default=0) <= MAX_TOP


def _has_its_next_tokens(run: Run) -> bool:
    return len(run.next_tokens) in (0, len(run.rows))


LAYOUTS = {
    layout.kind: layout
    for layout in (
        _layout(1, Hello, "I"),
        _layout(2, Run, "I??BII", OPS, ROWS, TOKENS, enums={3: Wants}, check=_has_its_next_tokens),
        _layout(3, Result, "I?II", RESULTS, TOP, check=_has_its_tops),
        _layout(4, Credit, "III"),
        _layout(5, Cancel, "?", CANCELLED),
        _layout(6, Prompt, "II?", TOKENS),
        _layout(7, Nodes, "II?", NODES),
        _layout(8, Advance, "II?", TOKENS),
        _layout(9, Close, "I"),
        _layout(10, Shutdown, ""),
        _layout(11, Probe, ""),
        _layout(12, Status, "?III"),
        _layout(13, Settings, "IdIdddQddBIb", BIASES, GRAMMAR),
        _layout(14, DraftOrder, "I?IIf"),
        _layout(15, Calibrate, "IIf", OFFSETS),
        _layout(16, Failed, "I"),
    )
}
"""The layout of each kind, by its class."""
_BY_CODE = {layout.code: layout for layout in LAYOUTS.values()}
MAX_NBYTES = ENVELOPE.size + max(layout.max_nbytes for layout in LAYOUTS.values())
"""The most bytes of a message, its tensor aside."""


def encode(message: Message) -> bytes:
    """The message's bytes; raises LocalProtocolError where a field does not fit."""
    body: Any = message.body
    layout = LAYOUTS[type(body)]
    lists = body[layout.numbers :]
    if layout.check and not layout.check(body):
        raise LocalProtocolError(f"the lists of a {message.kind} do not fit together")
    packed: list[bytes] = []
    try:
        for items, found in zip(layout.lists, lists, strict=True):
            if len(found) > items.most:
                raise LocalProtocolError(f"{len(found)} items in a list of a {message.kind}")
            packed += starmap(items.item.pack, found) if items.make else map(items.item.pack, found)
        envelope = ENVELOPE.pack(
            MAGIC, VERSION, layout.code, message.source, message.dest, message.txn, message.payload_nbytes
        )
        fixed = layout.fixed.pack(*body[: layout.numbers], *map(len, lists))
    except (struct.error, OverflowError) as error:
        raise LocalProtocolError(f"cannot encode {message.kind}: {error}") from error
    return b"".join((envelope, fixed, *packed))


def wire_nbytes(message: Message) -> int:
    """How many bytes ``encode`` makes of it, any tensor aside."""
    return ENVELOPE.size + LAYOUTS[type(message.body)].nbytes(message.body)


def decode(data: bytes | memoryview) -> Message:
    """The message at the beginning of ``data``, behind which its tensor may follow, whole; raises RemoteProtocolError
    for anything a correct peer would not send."""
    if len(data) < ENVELOPE.size:
        raise RemoteProtocolError(f"{len(data)} bytes are no envelope")
    magic, version, code, source, dest, txn, payload_nbytes = ENVELOPE.unpack_from(data)
    if magic != MAGIC:
        raise RemoteProtocolError(f"magic {magic:#06x}, expected {MAGIC:#06x}")
    if version != VERSION:
        raise RemoteProtocolError(f"protocol version {version}, this side speaks {VERSION}")
    layout = _BY_CODE.get(code)
    if layout is None:
        raise RemoteProtocolError(f"kind {code} is unknown")
    start = ENVELOPE.size + layout.fixed.size
    if len(data) < start:
        raise RemoteProtocolError(f"{len(data)} bytes are no {layout.kind.__name__}")
    fields = layout.fixed.unpack_from(data, ENVELOPE.size)
    numbers, lists, end = fields[: layout.numbers], list[tuple[Any, ...]](), start
    try:
        for items, count in zip(layout.lists, fields[layout.numbers :], strict=True):
            begin, end = end, end + items.item.size * count
            if count > items.most or end > len(data):
                raise ValueError(f"a list of {count} items")
            lists.append(items.read(data[begin:end]) if count else ())
        body: Body = layout.make(numbers, lists)
    except ValueError as error:
        raise RemoteProtocolError(f"{layout.kind.__name__}: {error}") from error
    if len(data) not in (end, end + payload_nbytes):
        raise RemoteProtocolError(f"{len(data)} bytes for a {layout.kind.__name__} of {end}")
    return Message(source, dest, body, txn, payload_nbytes)
