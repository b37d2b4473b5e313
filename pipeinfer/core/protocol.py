"""The messages between roles and their wire format.

A message is a fixed 40-byte little-endian header, then 16-byte slot operations, then 16-byte rows. At most one tensor
goes with it, of ``payload_nbytes``: behind the rows if it is small, else out of band. Nothing is ever pickled.

    header  magic:u16 version:u8 kind:u8 source:u16 dest:u16 flags:u16 request:u16 rows:u16 ops:u16
            epoch:u32 txn:u32 run:u32 payload_nbytes:u32 work_us:u32 slowest_us:u32
    op      kind:u8 pad:u8 slots:u16 slot:u32 position:u32 spare:u32
    row     token:i32 then two u32 and one u32 or f32, whose meaning depends on the kind (see Row, DraftRow, ResultRow,
            SettingRow)

Three channels carry them. STREAM is ordered per pair of roles; on it ``txn`` grows strictly. TENSOR is ordered too: the
n-th tensor that a pair moves there belongs to its n-th message that announces one and does not bring it. CONTROL may
overtake, repeat or lose: what travels there is advice, so that losing it costs time and never a token.
"""

from __future__ import annotations

import enum
import struct
from itertools import starmap
from typing import NamedTuple, TypeVar, cast

from pipeinfer.core.errors import LocalProtocolError, RemoteProtocolError

MAGIC = 0x4950
VERSION = 2
MAX_ROWS = 1024
MAX_OPS = 1024

HEADER = struct.Struct("<HBBHHHHHHIIIIII")
OP = struct.Struct("<BxHIII")
ROW = struct.Struct("<iIII")
REAL_ROW = struct.Struct("<iIIf")
MAX_NBYTES = HEADER.size + MAX_OPS * OP.size + MAX_ROWS * ROW.size

ORCHESTRATOR = 0
FIRST_STAGE = 1
FIRST_DRAFTER = 0x8000
NO_SLOT = 0xFFFFFFFF
"""The parent of a row that attends to the canonical sequence alone."""


def stage_address(index: int) -> int:
    """The address of the ``index``-th stage, counted from 0."""
    return FIRST_STAGE + index


def drafter_address(index: int) -> int:
    """The address of the ``index``-th drafter, counted from 0."""
    return FIRST_DRAFTER + index


def address_name(address: int) -> str:
    """An address as people read it: ``orchestrator``, ``stage 3``, ``drafter 0``."""
    if address == ORCHESTRATOR:
        return "orchestrator"
    return f"drafter {address - FIRST_DRAFTER}" if address >= FIRST_DRAFTER else f"stage {address - FIRST_STAGE}"


class Kind(enum.IntEnum):
    """What a message says; the comment names sender and receiver."""

    HELLO = 1  # stage, drafter -> orchestrator: I am ready; ``run`` holds my configuration digest
    RUN = 2  # orchestrator -> first stage -> ... -> last stage: slot operations, rows, activations
    RESULT = 3  # last stage -> orchestrator: the target's choice after each row
    CREDIT = 4  # first stage -> orchestrator: the next run may follow ``run``; its row says what the last one took
    CANCEL = 5  # orchestrator -> stages: these runs, or single rows of them, are dead (advice)
    PROMPT = 6  # orchestrator -> drafter: the next tokens of the prompt; LAST ends it
    NODES = 7  # drafter -> orchestrator: new nodes of the draft tree; ``run`` is its root position; LAST ends an order
    ADVANCE = 8  # orchestrator -> drafter: tokens accepted since the last one; with RESTART forget all guesses
    CLOSE = 9  # orchestrator -> drafter: the request is over
    SHUTDOWN = 10  # orchestrator -> everybody
    PROBE = 11  # orchestrator -> everybody: what are you doing? (asked when nothing has moved for long)
    STATUS = 12  # the answer: ``run`` the run being worked on (BUSY), ``txn`` messages taken, ``epoch`` runs waiting
    REQUEST = 13  # orchestrator -> first stage -> ... -> last stage, and -> drafters: how tokens are drawn
    ORDER = 14  # orchestrator -> drafter: so many more passes (see Order), until the next word
    CALIBRATE = 15  # orchestrator -> drafter: what your probabilities mean (see speculation.trees.calibration)
    FAILED = 16  # any rank -> orchestrator: I have failed, have said why, and end the job with exit code ``run``


class Flag(enum.IntFlag):
    """Bits of a message's ``flags``."""

    NONE = 0
    CANONICAL = 1  # the rows are accepted tokens and extend the canonical sequence (prefill)
    TOMBSTONE = 2  # a dead run: operations only, no rows, no tensor, nothing computed
    SILENT = 4  # no choice is wanted after these rows
    LAST = 8  # PROMPT: the prompt ends here. RUN: only the last row's choice is wanted. NODES: the order is done
    RELAY = 16  # CANCEL: pass it on to the stage before you
    BUSY = 64  # STATUS: something is being computed
    RESTART = 32  # ORDER, ADVANCE: forget every guess and begin again at the last accepted token


class SlotOpKind(enum.IntEnum):
    """What happens to a range of slots; applied in stream order, before the rows of the run that carries it."""

    COMMIT = 1  # slots [slot, slot+slots) become canonical at positions [position, position+slots)
    RELEASE = 2  # slots [slot, slot+slots) become free
    CLEAR = 3  # every slot becomes free: a new request


class SlotOp(NamedTuple):
    """One operation on so many neighbouring ``slots``."""

    kind: SlotOpKind
    slot: int = 0
    length: int = 0
    position: int = 0


class Row(NamedTuple):
    """One token of a run. ``parent`` is the slot it descends from, or NO_SLOT. Behind a stage where the row's numbers
    were not finite, ``token`` tells the layer instead: see ``fault_token``."""

    token: int
    slot: int
    parent: int
    position: int


class ResultRow(NamedTuple):
    """The target's next token after the row in ``slot``, with its log-probability (natural log). Of a row whose numbers
    were not finite ``token`` tells the layer (see ``fault_token``), and ``logp`` is 0. Such rows come back even where
    no choice was wanted after them."""

    token: int
    slot: int
    position: int
    logp: float


class DraftRow(NamedTuple):
    """A node of the draft tree: its name, its parent's name, and log P(token | parent) by the draft model."""

    token: int
    node: int
    parent: int
    logp: float


class SettingRow(NamedTuple):
    """A numbered setting with two whole numbers and a real one; which of them count depends on the setting."""

    setting: int
    low: int
    high: int
    value: float


AnyRow = Row | ResultRow | DraftRow | SettingRow
AnyRowT = TypeVar("AnyRowT", Row, ResultRow, DraftRow, SettingRow)
_ROW_TYPES: dict[Kind, tuple[struct.Struct, type[Row] | type[ResultRow] | type[DraftRow] | type[SettingRow]]] = {
    Kind.RUN: (ROW, Row),
    Kind.CANCEL: (ROW, Row),  # ``slot``: the run's number; ``parent``: the slot of one row of it, or NO_SLOT for all
    Kind.RESULT: (REAL_ROW, ResultRow),
    Kind.PROMPT: (REAL_ROW, DraftRow),
    Kind.NODES: (REAL_ROW, DraftRow),
    Kind.ADVANCE: (REAL_ROW, DraftRow),
    Kind.REQUEST: (REAL_ROW, SettingRow),
    Kind.CREDIT: (REAL_ROW, SettingRow),  # ``low``: rows of a run, ``high``: the microseconds they took
    Kind.ORDER: (REAL_ROW, SettingRow),
    Kind.CALIBRATE: (REAL_ROW, SettingRow),
}
CONTROL_KINDS = frozenset({Kind.CANCEL, Kind.PROBE, Kind.STATUS, Kind.FAILED})


def row_type(kind: Kind) -> type[Row] | type[ResultRow] | type[DraftRow] | type[SettingRow]:
    """What the rows of a message of ``kind`` are; raises KeyError for a kind that has none."""
    return _ROW_TYPES[kind][1]


class Message(NamedTuple):
    """One message; see Kind for what each field means where it is not plain.

    RUN and RESULT say what the run has cost so far: ``work_us``, the passes of all stages together, and ``slowest_us``,
    the longest of them (microseconds)."""

    kind: Kind
    source: int
    dest: int
    flags: Flag = Flag.NONE
    request: int = 0
    epoch: int = 0
    txn: int = 0
    run: int = 0
    ops: tuple[SlotOp, ...] = ()
    rows: tuple[AnyRow, ...] = ()
    payload_nbytes: int = 0
    work_us: int = 0
    slowest_us: int = 0

    @property
    def is_control(self) -> bool:
        """Whether it travels on CONTROL, where order and delivery are not promised."""
        return self.kind in CONTROL_KINDS

    def rows_as(self, row_type: type[AnyRowT]) -> tuple[AnyRowT, ...]:
        """The rows, which a message of this kind has of one type only; none if it is another."""
        return cast("tuple[AnyRowT, ...]", self.rows) if self.rows and type(self.rows[0]) is row_type else ()


def encode(message: Message) -> bytes:
    """The message's bytes; raises LocalProtocolError where a field does not fit."""
    if len(message.rows) > MAX_ROWS or len(message.ops) > MAX_OPS:
        raise LocalProtocolError(f"{len(message.rows)} rows and {len(message.ops)} operations in one message")
    try:
        parts = [
            HEADER.pack(
                MAGIC, VERSION, message.kind, message.source, message.dest, message.flags, message.request,
                len(message.rows), len(message.ops), message.epoch, message.txn, message.run, message.payload_nbytes,
                message.work_us, message.slowest_us,
            )
        ]  # fmt: skip
        parts += [OP.pack(op.kind, op.length, op.slot, op.position, 0) for op in message.ops]
        if message.rows:
            layout, _ = _ROW_TYPES[message.kind]
            parts += [layout.pack(*row) for row in message.rows]
    except (struct.error, KeyError, OverflowError) as error:
        raise LocalProtocolError(f"cannot encode {message.kind.name}: {error}") from error
    return b"".join(parts)


def wire_nbytes(message: Message) -> int:
    """How many bytes ``encode`` makes of it, any tensor aside."""
    return HEADER.size + OP.size * len(message.ops) + ROW.size * len(message.rows)


def decode(data: bytes | memoryview) -> Message:
    """The message at the beginning of ``data``, behind which its tensor may follow, whole; raises RemoteProtocolError
    for anything a correct peer would not send."""
    if len(data) < HEADER.size:
        raise RemoteProtocolError(f"{len(data)} bytes are no header")
    fields = HEADER.unpack_from(data)
    magic, version, kind_code, source, dest, flags, request, row_count, op_count, *counters = fields
    if magic != MAGIC:
        raise RemoteProtocolError(f"magic {magic:#06x}, expected {MAGIC:#06x}")
    if version != VERSION:
        raise RemoteProtocolError(f"protocol version {version}, this side speaks {VERSION}")
    if row_count > MAX_ROWS or op_count > MAX_OPS:
        raise RemoteProtocolError(f"{row_count} rows and {op_count} operations exceed the bounds")
    epoch, txn, run, nbytes, work_us, slowest_us = counters
    end = HEADER.size + OP.size * op_count + ROW.size * row_count
    if len(data) not in (end, end + nbytes):
        raise RemoteProtocolError(f"{len(data)} bytes for {op_count} operations and {row_count} rows")
    try:
        kind = Kind(kind_code)
        flag_bits = Flag(flags)
        rows_at = HEADER.size + OP.size * op_count
        ops = tuple(
            SlotOp(SlotOpKind(code), slot, length, position)
            for code, length, slot, position, _ in OP.iter_unpack(data[HEADER.size : rows_at])
        )
        rows: tuple[AnyRow, ...] = ()
        if row_count:
            layout, row_type = _ROW_TYPES[kind]
            rows = tuple(starmap(row_type, layout.iter_unpack(data[rows_at:end])))
    except (ValueError, KeyError) as error:
        raise RemoteProtocolError(f"kind {kind_code}: {error}") from error
    return Message(kind, source, dest, flag_bits, request, epoch, txn, run, ops, rows, nbytes, work_us, slowest_us)


class Edges:
    """The transaction numbers of one role: stamped on what it sends, checked on what it receives (invariant L4)."""

    def __init__(self, address: int) -> None:
        self.address = address
        self._sent: dict[int, int] = {}
        self._seen: dict[int, int] = {}

    def stamp(self, dest: int) -> int:
        """The next transaction number on the edge to ``dest``."""
        txn = self._sent.get(dest, 0) + 1
        self._sent[dest] = txn
        return txn

    def check(self, message: Message) -> None:
        """Raise RemoteProtocolError unless ``message`` is the next one of its edge."""
        if message.is_control:
            return
        expected = self._seen.get(message.source, 0) + 1
        if message.txn != expected:
            raise RemoteProtocolError(
                f"{address_name(self.address)} expected transaction {expected} from {address_name(message.source)}, "
                f"got {message.txn} ({message.kind.name})"
            )
        self._seen[message.source] = expected

    @property
    def taken(self) -> int:
        """How many ordered messages this role has taken."""
        return sum(self._seen.values())


def fault_token(layer: int) -> int:
    """What stands for the token of a row whose numbers were not finite in ``layer`` (the number of layers: in the
    output head); tokens themselves are never negative."""
    return -1 - layer


def fault_layer(token: int) -> int | None:
    """The layer that ``token`` tells, or None if it is a token."""
    return None if token >= 0 else -1 - token


def accepted_name(position: int) -> int:
    """The name that both sides of a draft tree know an accepted token by, whoever guessed it first."""
    return 0x80000000 | position
