"""Invariant L7: the bytes of every kind, and what happens to bytes that no correct peer would send."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.ports import Sampling
from pipeinfer.core.protocol import (
    NO_SLOT,
    AnyRow,
    DraftRow,
    Flag,
    Kind,
    Message,
    ResultRow,
    Row,
    SettingRow,
    SlotOp,
    SlotOpKind,
    decode,
    encode,
    wire_nbytes,
)
from speculation.trees.calibration import Calibration

GOLDEN = {
    Message(Kind.HELLO, 3, 0, txn=1, run=0xDEADBEEF): (
        "50490201030000000000000000000000 0000000001000000efbeadde00000000 0000000000000000"
    ),
    Message(
        Kind.RUN, 0, 1, Flag.CANONICAL | Flag.LAST, request=2, epoch=3, txn=4, run=5, payload_nbytes=4096,
        ops=(SlotOp(SlotOpKind.CLEAR), SlotOp(SlotOpKind.COMMIT, 7, 2, 9), SlotOp(SlotOpKind.RELEASE, 11, 3)),
        rows=(Row(258, 10, 0xFFFFFFFF, 12), Row(-1, 13, 10, 13)),
    ): (
        "50490202000001000900020002000300 03000000040000000500000000100000 0000000000000000 "
        "03000000000000000000000000000000 "
        "01000200070000000900000000000000 "
        "020003000b0000000000000000000000 "
        "020100000a000000ffffffff0c000000 "
        "ffffffff0d0000000a0000000d000000"
    ),
    Message(
        Kind.RUN, 1, 2, Flag.TOMBSTONE, request=2, txn=6, run=7, ops=(SlotOp(SlotOpKind.COMMIT, 1, 1, 1),), work_us=258,
        slowest_us=3,
    ): (
        "50490202010002000200020000000100 00000000060000000700000000000000 0201000003000000 "
        "01000100010000000100000000000000"
    ),
    Message(
        Kind.RESULT, 2, 0, request=2, txn=8, run=5, rows=(ResultRow(17, 13, 14, -0.5),), work_us=0xFFFFFFFF,
        slowest_us=1 << 31,
    ): (
        "50490203020000000000020001000000 00000000080000000500000000000000 ffffffff00000080 "
        "110000000d0000000e000000000000bf"
    ),
    Message(Kind.CREDIT, 1, 0, request=2, txn=9, run=5): (
        "50490204010000000000020000000000 00000000090000000500000000000000 0000000000000000"
    ),
    Message(Kind.CREDIT, 1, 0, request=2, txn=10, run=6, rows=(SettingRow(0, 8, 70_000, 0.0),)): (
        "50490204010000000000020001000000 000000000a0000000600000000000000 0000000000000000 "
        "00000000080000007011010000000000"
    ),
    Message(Kind.CANCEL, 0, 2, Flag.RELAY, request=2, epoch=1, rows=(Row(0, 6, NO_SLOT, 0), Row(0, 7, 3, 0))): (
        "50490205000002001000020002000000 01000000000000000000000000000000 0000000000000000 "
        "0000000006000000ffffffff00000000 "
        "00000000070000000300000000000000"
    ),
    Message(Kind.PROMPT, 0, 0x8000, Flag.LAST, request=2, txn=1, run=40, rows=(DraftRow(5, 0, 0, 0.0),)): (
        "50490206000000800800020001000000 00000000010000002800000000000000 0000000000000000 "
        "05000000000000000000000000000000"
    ),
    Message(Kind.NODES, 0x8000, 0, Flag.LAST, request=2, txn=3, run=12, rows=(DraftRow(5, 1, 0x8000000C, -2.0),)): (
        "50490207008000000800020001000000 00000000030000000c00000000000000 0000000000000000 "
        "05000000010000000c000080000000c0"
    ),
    Message(Kind.ADVANCE, 0, 0x8002, Flag.RESTART, request=2, txn=2, rows=(DraftRow(5, 0x8000000D, 0, 0.0),)): (
        "50490208000002802000020001000000 00000000020000000000000000000000 0000000000000000 "
        "050000000d0000800000000000000000"
    ),
    Message(Kind.CLOSE, 0, 0x8000, request=2, txn=3): (
        "50490209000000800000020000000000 00000000030000000000000000000000 0000000000000000"
    ),
    Message(Kind.SHUTDOWN, 0, 1, request=2, txn=10): (
        "5049020a000001000000020000000000 000000000a0000000000000000000000 0000000000000000"
    ),
    Message(Kind.PROBE, 0, 1): (
        "5049020b000001000000000000000000 00000000000000000000000000000000 0000000000000000"
    ),
    Message(Kind.STATUS, 1, 0, epoch=2, txn=33, run=5): (
        "5049020c010000000000000000000000 02000000210000000500000000000000 0000000000000000"
    ),
    Message(
        Kind.REQUEST, 0, 1, request=2, txn=1,
        rows=Sampling(0.75, 20, 0.875, 0.0625, 1.25, seed=0x7DEADBEEF).rows(),
    ): (
        "5049020d000001000000020005000000 00000000010000000000000000000000 0000000000000000 "
        "0000000014000000000000000000403f "
        "0100000014000000000000000000603f "
        "0200000014000000000000000000803d "
        "0300000014000000000000000000a03f "
        "04000000efbeadde0700000000000000"
    ),
    Message(Kind.ORDER, 0, 0x8001, Flag.RESTART, request=2, txn=4, rows=(SettingRow(0, 3, 0, 0.5),)): (
        "5049020e000001802000020001000000 00000000040000000000000000000000 0000000000000000 "
        "0000000003000000000000000000003f"
    ),
    Message(Kind.CALIBRATE, 0, 0x8000, request=2, txn=5, rows=Calibration(1).rows()): (
        "5049020f000000800000020002000000 00000000050000000000000000000000 0000000000000000 "
        "0000000000000000000000000000803f "
        "01000000000000000000000000000000"
    ),
    Message(Kind.FAILED, 3, 0, run=143): (
        "50490210030000000000000000000000 00000000000000008f00000000000000 0000000000000000"
    ),
}  # fmt: skip


def test_every_kind_has_golden_bytes() -> None:
    assert {message.kind for message in GOLDEN} == set(Kind)


def test_every_kind_that_carries_rows_has_a_strategy() -> None:
    assert ROWS.keys() == {message.kind for message in GOLDEN if message.rows}


@pytest.mark.parametrize(("message", "golden"), GOLDEN.items(), ids=[message.kind.name for message in GOLDEN])
def test_golden_bytes(message: Message, golden: str) -> None:
    assert encode(message).hex() == golden.replace(" ", "")
    assert decode(bytes.fromhex(golden)) == message


WORD, SHORT = st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1)
TOKEN, REAL = st.integers(-(2**31), 2**31 - 1), st.floats(width=32, allow_nan=False)
ROWS: dict[Kind, st.SearchStrategy[Any]] = {
    Kind.RUN: st.builds(Row, TOKEN, WORD, WORD, WORD),
    Kind.CANCEL: st.builds(Row, TOKEN, WORD, WORD, WORD),
    Kind.RESULT: st.builds(ResultRow, TOKEN, WORD, WORD, REAL),
}
ROWS |= {kind: st.builds(DraftRow, TOKEN, WORD, WORD, REAL) for kind in (Kind.PROMPT, Kind.NODES, Kind.ADVANCE)}
SETTING_KINDS = Kind.REQUEST, Kind.CREDIT, Kind.ORDER, Kind.CALIBRATE
ROWS |= {kind: st.builds(SettingRow, TOKEN, WORD, WORD, REAL) for kind in SETTING_KINDS}
OPS = st.builds(SlotOp, st.sampled_from(SlotOpKind), WORD, SHORT, WORD)
FLAGS = st.integers(0, sum(Flag)).map(Flag)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    kind = draw(st.sampled_from(Kind))
    rows: list[AnyRow] = draw(st.lists(ROWS[kind], max_size=5)) if kind in ROWS else []
    ops = draw(st.lists(OPS, max_size=5))
    source, dest, request = draw(SHORT), draw(SHORT), draw(SHORT)
    epoch, txn, run, nbytes, work_us, slowest_us = (draw(WORD) for _ in range(6))
    return Message(
        kind, source, dest, draw(FLAGS), request, epoch, txn, run, tuple(ops), tuple(rows), nbytes, work_us, slowest_us
    )


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
    padding = data.draw(st.integers(1, 100).filter(lambda nbytes: nbytes != message.payload_nbytes))
    for wrong in (whole[:cut], whole + bytes(padding)):
        with pytest.raises(RemoteProtocolError):
            decode(wrong)


@given(messages(), st.binary(min_size=1, max_size=100))
def test_a_tensor_may_follow_whole(message: Message, tensor: bytes) -> None:
    message = message._replace(payload_nbytes=len(tensor))
    data = encode(message) + tensor
    assert decode(memoryview(data)) == message
    assert data[wire_nbytes(message) :] == tensor
