"""Law L7: the bytes of every kind, and what happens to bytes that no correct peer would send."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeinfer.errors import RemoteProtocolError
from pipeinfer.protocol import (
    AnyRow,
    CellOp,
    CellOpKind,
    ChoiceRow,
    DraftRow,
    Flag,
    Kind,
    Message,
    Row,
    decode,
    encode,
)

GOLDEN = {
    Message(Kind.HELLO, 3, 0, txn=1, run=0xDEADBEEF): (
        "50490101030000000000000000000000 0000000001000000efbeadde00000000"
    ),
    Message(
        Kind.RUN, 0, 1, Flag.CANONICAL | Flag.LAST, request=2, epoch=3, txn=4, run=5, payload_nbytes=4096,
        ops=(CellOp(CellOpKind.CLEAR), CellOp(CellOpKind.COMMIT, 7, 2, 9), CellOp(CellOpKind.RELEASE, 11, 3)),
        rows=(Row(258, 10, 0xFFFFFFFF, 12), Row(-1, 13, 10, 13)),
    ): (
        "50490102000001000900020002000300 03000000040000000500000000100000 "
        "03000000000000000000000000000000 "
        "01000200070000000900000000000000 "
        "020003000b0000000000000000000000 "
        "020100000a000000ffffffff0c000000 "
        "ffffffff0d0000000a0000000d000000"
    ),
    Message(Kind.RUN, 1, 2, Flag.TOMBSTONE, request=2, txn=6, run=7, ops=(CellOp(CellOpKind.COMMIT, 1, 1, 1),)): (
        "50490102010002000200020000000100 00000000060000000700000000000000 "
        "01000100010000000100000000000000"
    ),
    Message(Kind.RESULT, 2, 0, request=2, txn=8, run=5, rows=(ChoiceRow(17, 13, 14, -0.5),)): (
        "50490103020000000000020001000000 00000000080000000500000000000000 "
        "110000000d0000000e000000000000bf"
    ),
    Message(Kind.CREDIT, 1, 0, request=2, txn=9, run=5): (
        "50490104010000000000020000000000 00000000090000000500000000000000"
    ),
    Message(Kind.CANCEL, 0, 2, Flag.RELAY, request=2, epoch=1, rows=(Row(0, 6, 0, 0), Row(0, 7, 0, 0))): (
        "50490105000002001000020002000000 01000000000000000000000000000000 "
        "00000000060000000000000000000000 "
        "00000000070000000000000000000000"
    ),
    Message(Kind.PROMPT, 0, 0x8000, Flag.LAST, request=2, txn=1, run=40, rows=(DraftRow(5, 0, 0, 0.0),)): (
        "50490106000000800800020001000000 00000000010000002800000000000000 "
        "05000000000000000000000000000000"
    ),
    Message(Kind.NODES, 0x8000, 0, request=2, txn=3, run=12, rows=(DraftRow(5, 1, 0x8000000C, -2.0),)): (
        "50490107008000000000020001000000 00000000030000000c00000000000000 "
        "05000000010000000c000080000000c0"
    ),
    Message(Kind.ADVANCE, 0, 0x8000, request=2, txn=2, rows=(DraftRow(5, 0x8000000D, 0, 0.0),)): (
        "50490108000000800000020001000000 00000000020000000000000000000000 "
        "050000000d0000800000000000000000"
    ),
    Message(Kind.CLOSE, 0, 0x8000, request=2, txn=3): (
        "50490109000000800000020000000000 00000000030000000000000000000000"
    ),
    Message(Kind.SHUTDOWN, 0, 1, request=2, txn=10): (
        "5049010a000001000000020000000000 000000000a0000000000000000000000"
    ),
    Message(Kind.PROBE, 0, 1): (
        "5049010b000001000000000000000000 00000000000000000000000000000000"
    ),
    Message(Kind.STATUS, 1, 0, epoch=2, txn=33, run=5): (
        "5049010c010000000000000000000000 02000000210000000500000000000000"
    ),
}  # fmt: skip


def test_every_kind_has_golden_bytes() -> None:
    assert {message.kind for message in GOLDEN} == set(Kind)


@pytest.mark.parametrize(("message", "golden"), GOLDEN.items(), ids=[message.kind.name for message in GOLDEN])
def test_golden_bytes(message: Message, golden: str) -> None:
    assert encode(message).hex() == golden.replace(" ", "")
    assert decode(bytes.fromhex(golden)) == message


WORD, SHORT = st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1)
TOKEN, REAL = st.integers(-(2**31), 2**31 - 1), st.floats(width=32, allow_nan=False)
ROWS: dict[Kind, st.SearchStrategy[Any]] = {
    Kind.RUN: st.builds(Row, TOKEN, WORD, WORD, WORD),
    Kind.CANCEL: st.builds(Row, TOKEN, WORD, WORD, WORD),
    Kind.RESULT: st.builds(ChoiceRow, TOKEN, WORD, WORD, REAL),
} | {kind: st.builds(DraftRow, TOKEN, WORD, WORD, REAL) for kind in (Kind.PROMPT, Kind.NODES, Kind.ADVANCE)}
OPS = st.builds(CellOp, st.sampled_from(CellOpKind), WORD, SHORT, WORD)
FLAGS = st.integers(0, 31).map(Flag)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    kind = draw(st.sampled_from(Kind))
    rows: list[AnyRow] = draw(st.lists(ROWS[kind], max_size=5)) if kind in ROWS else []
    ops = draw(st.lists(OPS, max_size=5))
    source, dest, request = draw(SHORT), draw(SHORT), draw(SHORT)
    epoch, txn, run, nbytes = draw(WORD), draw(WORD), draw(WORD), draw(WORD)
    return Message(kind, source, dest, draw(FLAGS), request, epoch, txn, run, tuple(ops), tuple(rows), nbytes)


@given(messages())
def test_what_is_decoded_is_what_was_encoded(message: Message) -> None:
    data = encode(message)
    assert decode(data) == message
    assert encode(decode(memoryview(data))) == data


def survives(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        decode(data)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_politely(data: bytes) -> None:
    survives(data)
    survives(bytes.fromhex(GOLDEN[Message(Kind.PROBE, 0, 1)])[:4] + data)


@given(messages(), st.data())
def test_flipped_bits_are_refused_or_read(message: Message, data: st.DataObject) -> None:
    damaged = bytearray(encode(message))
    for bit in data.draw(st.lists(st.integers(0, 8 * len(damaged) - 1), min_size=1, max_size=4)):
        damaged[bit // 8] ^= 1 << bit % 8
    survives(bytes(damaged))


@given(messages(), st.data())
def test_truncated_or_padded_messages_are_refused(message: Message, data: st.DataObject) -> None:
    whole = encode(message)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for wrong in (whole[:cut], whole + whole[:cut] + b"\0"):
        with pytest.raises(RemoteProtocolError):
            decode(wrong)
