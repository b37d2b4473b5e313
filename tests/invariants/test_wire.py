"""Invariant L7: the bytes of every kind, and what happens to bytes that no correct peer would send."""

from __future__ import annotations

import contextlib
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeinfer.core.errors import LocalProtocolError, RemoteProtocolError
from pipeinfer.core.messages import (
    NO_SLOT,
    NO_TOKEN,
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
    accepted_name,
)
from pipeinfer.core.wire import ENVELOPE, LAYOUTS, MAX_NBYTES, Layout, decode, encode, wire_nbytes
from tests.unit.bodies import bodies

GOLDEN: tuple[tuple[Message, str], ...] = (
    (
        Message(3, 0, Hello(0xDEADBEEF), txn=1),
        "50490601030000000100000000000000 efbeadde",
    ),
    (
        Message(
            0, 1,
            Run(
                5, True, False, Wants.LAST, 258, 3,
                (
                    SlotOp(SlotOpKind.FREE, sequence=6), SlotOp(SlotOpKind.COMMIT, 7, 2, 9, 8),
                    SlotOp(SlotOpKind.RELEASE, 11, 3, 0, 8), SlotOp(SlotOpKind.TRUNCATE, 0, 4, 0, 8),
                    SlotOp(SlotOpKind.FORK, 8, 513, 0, 9),
                ),
                (Row(258, 10, NO_SLOT, 12, 8), Row(-1, 13, 10, 13, 8)),
                (259, NO_TOKEN),
            ),
            txn=4, payload_nbytes=4096,
        ),
        "50490602000001000400000000100000 050000000100010201000003000000050002000200 "
        "03000000000000000000000600000000 "
        "01070000000200090000000800000000 "
        "020b0000000300000000000800000000 "
        "04000000000400000000000800000000 "
        "05080000000102000000000900000000 "
        "020100000a000000ffffffff0c00000008000000 "
        "ffffffff0d0000000a0000000d00000008000000 "
        "03010000 "
        "ffffffff",
    ),
    (
        Message(1, 2, Run(7, False, True, Wants.NOTHING, 258, 3, (SlotOp(SlotOpKind.COMMIT, 1, 1, 1, 2),)), txn=6),
        "50490602010002000600000000000000 070000000001000201000003000000010000000000 "
        "01010000000100010000000200000000",
    ),
    (
        Message(2, 0, Result(5, False, 0xFFFFFFFF, 1 << 31, (ResultRow(17, 13, 14, -0.5, 8),)), txn=8),
        "50490603020000000800000000000000 0500000000ffffffff0000008001000000 "
        "110000000d0000000e000000000000bf0800000000",
    ),
    (
        Message(
            2, 0,
            Result(
                6, False, 9, 4,
                (ResultRow(17, 13, 14, -0.5, 8, 3), ResultRow(-3, 2, 15, 0.0, 9), ResultRow(2, 3, 4, -4.0, 9, 1)),
                (TopToken(17, -0.5), TopToken(18, -1.0), TopToken(1, -2.0), TopToken(2, -4.0)),
            ),
            txn=9,
        ),
        "50490603020000000900000000000000 0600000000090000000400000003000400 "
        "110000000d0000000e000000000000bf0800000003 "
        "fdffffff020000000f000000000000000900000000 "
        "020000000300000004000000000080c00900000001 "
        "11000000000000bf "
        "12000000000080bf "
        "01000000000000c0 "
        "02000000000080c0",
    ),
    (
        Message(2, 0, Result(7, True, 258, 3), txn=10),
        "50490603020000000a00000000000000 0700000001020100000300000000000000",
    ),
    (
        Message(1, 0, Credit(5), txn=9),
        "50490604010000000900000000000000 050000000000000000000000",
    ),
    (
        Message(1, 0, Credit(6, 8, 70_000), txn=10),
        "50490604010000000a00000000000000 060000000800000070110100",
    ),
    (
        Message(0, 2, Cancel(True, (Cancelled(6, NO_SLOT, 2), Cancelled(7, 3, 2)))),
        "50490605000002000000000000000000 010200 "
        "06000000ffffffff02000000 "
        "070000000300000002000000",
    ),
    (
        Message(
            0, 1,
            Settings(
                2, 0.75, 20, 0.875, 0.0625, 1.25, 0x7DEADBEEF, 0.5, -2.0, 5, 258, -1,
                (TokenBias(5, -1.0), TokenBias(258, 2.0)), tuple(b'{"}'),
            ),
            txn=1,
        ),
        "5049060d000001000100000000000000 "
        "02000000000000000000e83f14000000000000000000ec3f000000000000b03f000000000000f43fefbeadde07000000 "
        "000000000000e03f00000000000000c00502010000ff02000300 "
        "05000000000080bf "
        "0201000000000040 "
        "7b227d",
    ),
    (
        Message(0, 0x8000, Prompt(2, 40, True, (5, 258)), txn=1),
        "50490606000000800100000000000000 0200000028000000010200 "
        "05000000 "
        "02010000",
    ),
    (
        Message(0x8000, 0, Nodes(2, 12, True, (DraftNode(5, 1, accepted_name(12), -2.0),)), txn=3),
        "50490607008000000300000000000000 020000000c000000010100 "
        "05000000010000000c000080000000c0",
    ),
    (
        Message(0, 0x8002, Advance(2, 13, True, (5, 6)), txn=2),
        "50490608000002800200000000000000 020000000d000000010200 "
        "05000000 "
        "06000000",
    ),
    (
        Message(0, 0x8000, Close(2), txn=3),
        "50490609000000800300000000000000 02000000",
    ),
    (
        Message(0, 0x8001, DraftOrder(2, True, 3, 4, 0.5), txn=4),
        "5049060e000001800400000000000000 020000000103000000040000000000003f",
    ),
    (
        Message(0, 0x8000, Calibrate(7, 56, 0.5, (1.0, -2.0)), txn=5),
        "5049060f000000800500000000000000 07000000380000000000003f0200 "
        "0000803f "
        "000000c0",
    ),
    (
        Message(0, 1, Shutdown(), txn=10),
        "5049060a000001000a00000000000000",
    ),
    (
        Message(0, 1, Probe()),
        "5049060b000001000000000000000000",
    ),
    (
        Message(1, 0, Status(True, 5, 2, 33)),
        "5049060c010000000000000000000000 01050000000200000021000000",
    ),
    (
        Message(3, 0, Failed(143)),
        "50490610030000000000000000000000 8f000000",
    ),)  # fmt: skip
"""Messages and their bytes, a space between the envelope, the numbers, and the items of lists."""


def is_same(one: Message, other: Message) -> bool:
    """Bodies of two kinds may be equal as tuples."""
    return one == other and type(one.body) is type(other.body)


def test_every_kind_has_a_layout_golden_bytes_and_a_strategy() -> None:
    kinds = set(get_args(Body))
    assert LAYOUTS.keys() == {type(message.body) for message, _ in GOLDEN} == BODIES.keys() == kinds
    assert len({layout.code for layout in LAYOUTS.values()}) == len(kinds)


def test_every_list_and_every_operation_is_in_some_golden_bytes() -> None:
    for layout in LAYOUTS.values():
        mine = [message.body for message, _ in GOLDEN if type(message.body) is layout.kind]
        for place in range(layout.numbers, layout.numbers + len(layout.lists)):
            assert any(tuple(body)[place] for body in mine), layout.kind
    assert {op.kind for message, _ in GOLDEN for op in getattr(message.body, "ops", ())} == set(SlotOpKind)


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=[message.kind for message, _ in GOLDEN])
def test_golden_bytes(message: Message, golden: str) -> None:
    assert encode(message).hex() == golden.replace(" ", "")
    assert is_same(decode(bytes.fromhex(golden)), message)
    assert wire_nbytes(message) == len(bytes.fromhex(golden))


WORD, SHORT = st.integers(0, 2**32 - 1), st.integers(0, 2**16 - 1)
BODIES = bodies()
MESSAGES = st.builds(Message, SHORT, SHORT, st.sampled_from(list(BODIES)).flatmap(BODIES.__getitem__), WORD, WORD)


@given(MESSAGES)
def test_what_is_decoded_is_what_was_encoded(message: Message) -> None:
    data = encode(message)
    assert is_same(decode(data), message)
    assert encode(decode(memoryview(data))) == data
    assert len(data) == wire_nbytes(message) <= MAX_NBYTES


def survives(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        decode(data)


@given(st.sampled_from([golden for _, golden in GOLDEN]), st.binary(max_size=200))
def test_random_bytes_are_refused_politely(golden: str, data: bytes) -> None:
    survives(data)
    survives(bytes.fromhex(golden)[:4] + data)
    survives(bytes.fromhex(golden)[: ENVELOPE.size] + data)


@given(MESSAGES, st.data())
def test_flipped_bits_are_refused_or_read(message: Message, data: st.DataObject) -> None:
    damaged = bytearray(encode(message))
    for bit in data.draw(st.lists(st.integers(0, 8 * len(damaged) - 1), min_size=1, max_size=4)):
        damaged[bit // 8] ^= 1 << bit % 8
    survives(bytes(damaged))


@given(MESSAGES, st.data())
def test_truncated_or_padded_messages_are_refused(message: Message, data: st.DataObject) -> None:
    whole = encode(message)
    cut = data.draw(st.integers(0, len(whole) - 1))
    padding = data.draw(st.integers(1, 100).filter(lambda nbytes: nbytes != message.payload_nbytes))
    for wrong in (whole[:cut], whole + bytes(padding)):
        with pytest.raises(RemoteProtocolError):
            decode(wrong)


@given(MESSAGES, st.binary(min_size=1, max_size=100))
def test_a_tensor_may_follow_whole(message: Message, tensor: bytes) -> None:
    message = message._replace(payload_nbytes=len(tensor))
    data = encode(message) + tensor
    assert is_same(decode(memoryview(data)), message)
    assert data[wire_nbytes(message) :] == tensor


# What is refused on both sides.


def refused(body: Body, data: bytes) -> None:
    """Neither may ``body`` leave, nor are its bytes ``data`` taken."""
    with pytest.raises(LocalProtocolError):
        encode(Message(1, 0, body))
    with pytest.raises(RemoteProtocolError):
        decode(data)


def lists() -> list[tuple[Layout, int]]:
    return [(layout, place) for layout in LAYOUTS.values() for place in range(len(layout.lists))]


@pytest.mark.parametrize(("layout", "place"), lists(), ids=lambda value: getattr(value, "kind", int).__name__)
def test_a_list_beyond_its_bound_is_refused(layout: Layout, place: int) -> None:
    items = layout.lists[place]
    for count in (items.most + 1, 0xFFFF):
        if not items.most < count <= 0xFFFF:
            continue
        made = items.read(bytes([1] * items.item.size)) * count  # 1 is a number of every enumeration
        counts = [count if other == place else 0 for other in range(len(layout.lists))]
        numbers = [1] * layout.numbers
        body = layout.kind(*numbers, *(made if other == place else () for other in range(len(layout.lists))))
        data = envelope_of(layout) + layout.fixed.pack(*numbers, *counts)
        refused(body, data + bytes([1] * (items.item.size * count)))


@pytest.mark.parametrize("count", [1, 3])
def test_next_tokens_of_other_rows_are_refused(count: int) -> None:
    wrong, layout = Run(5, rows=(Row(1, 2, 3, 4),) * 2, next_tokens=(7,) * count), LAYOUTS[Run]
    fixed = layout.fixed.pack(*wrong[: layout.numbers], 0, 2, count)
    rows = layout.lists[1].item.pack(*wrong.rows[0]) * 2
    refused(wrong, envelope_of(layout) + fixed + rows + layout.lists[2].item.pack(7) * count)


def with_tops(*counts: int, pairs: int) -> Result:
    rows = tuple([ResultRow(1, 2 + index, 3, -0.5, 0, count) for index, count in enumerate(counts)])
    return Result(5, rows=rows, top=(TopToken(7, -1.0),) * pairs)


@pytest.mark.parametrize(("counts", "pairs"), [((0, 2), 1), ((1, 1), 3), ((), 1), ((21,), 21), ((0, 20, 21), 41)])
def test_pairs_that_no_row_has_are_refused(counts: tuple[int, ...], pairs: int) -> None:
    """Neither are rows taken that have pairs which are not there, or too many."""
    wrong, layout = with_tops(*counts, pairs=pairs), LAYOUTS[Result]
    fixed = layout.fixed.pack(*wrong[: layout.numbers], len(wrong.rows), pairs)
    both = zip(layout.lists, wrong[layout.numbers :], strict=True)
    lists = b"".join(items.item.pack(*one) for items, found in both for one in found)
    refused(wrong, envelope_of(layout) + fixed + lists)


def envelope_of(layout: Layout) -> bytes:
    envelope = encode(Message(1, 0, Hello(0)))[: ENVELOPE.size]
    return envelope[:3] + bytes([layout.code]) + envelope[4:]


@pytest.mark.parametrize("counts", [(0, 0), (1, 1), (0, 3, 0, 20), (2, 0)])
def test_each_row_has_its_own_number_of_pairs(counts: tuple[int, ...]) -> None:
    result = with_tops(*counts, pairs=sum(counts))
    result = result._replace(top=tuple([TopToken(index, -1.0) for index in range(sum(counts))]))
    message = Message(1, 0, result)
    assert is_same(decode(encode(message)), message)
    assert [len(top) for top in result.tops()] == list(counts)
    assert [pair for top in result.tops() for pair in top] == list(result.top)


@pytest.mark.parametrize("number", [0, 6, 255])
def test_unknown_operations_are_refused(number: int) -> None:
    data = bytearray(encode(Message(0, 1, Run(1, ops=(SlotOp(SlotOpKind.FREE),)))))
    data[ENVELOPE.size + LAYOUTS[Run].fixed.size] = number
    with pytest.raises(RemoteProtocolError, match=f"Run: {number} is not a valid SlotOpKind"):
        decode(bytes(data))


@pytest.mark.parametrize("number", [3, 255])
def test_unknown_wants_are_refused(number: int) -> None:
    data = bytearray(encode(Message(0, 1, Run(1))))
    assert data[ENVELOPE.size + 6] == Wants.EVERY
    data[ENVELOPE.size + 6] = number
    with pytest.raises(RemoteProtocolError, match=f"Run: {number} is not a valid Wants"):
        decode(bytes(data))
