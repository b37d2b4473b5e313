from __future__ import annotations

import pytest

from pipeinfer.core.errors import LocalProtocolError, RemoteProtocolError
from pipeinfer.core.protocol import (
    HEADER,
    MAX_OPS,
    MAX_ROWS,
    Edges,
    Flag,
    Kind,
    Message,
    Row,
    SettingRow,
    SlotOp,
    SlotOpKind,
    accepted_name,
    address_name,
    decode,
    drafter_address,
    encode,
    stage_address,
)


def test_sizes_are_what_the_format_says() -> None:
    row, op = Row(1, 2, 3, 4), SlotOp(SlotOpKind.COMMIT, 1, 1, 1)
    assert len(encode(Message(Kind.CREDIT, 1, 0))) == HEADER.size == 40
    assert len(encode(Message(Kind.RUN, 0, 1, ops=(op,) * 3, rows=(row,) * 5))) == 40 + 16 * 3 + 16 * 5


def test_addresses_have_names() -> None:
    assert [address_name(a) for a in (0, stage_address(0), stage_address(11), drafter_address(2))] == [
        "orchestrator", "stage 0", "stage 11", "drafter 2",
    ]  # fmt: skip


def test_accepted_names_never_meet_a_drafters_own() -> None:
    assert accepted_name(0) == 0x80000000
    assert accepted_name(77) - accepted_name(0) == 77


@pytest.mark.parametrize(
    "message",
    [
        Message(Kind.RUN, 0, 1, rows=(Row(1, 2, 3, 4),) * (MAX_ROWS + 1)),
        Message(Kind.RUN, 0, 1, ops=(SlotOp(SlotOpKind.CLEAR),) * (MAX_OPS + 1)),
        Message(Kind.RUN, 0, 1, rows=(Row(1 << 31, 2, 3, 4),)),
        Message(Kind.RUN, 0, 1, rows=(Row(1, -1, 3, 4),)),
        Message(Kind.RUN, 0, 1, txn=1 << 32),
        Message(Kind.RUN, 0, 1 << 16),
        Message(Kind.HELLO, 1, 0, rows=(Row(1, 2, 3, 4),)),
        Message(Kind.RESULT, 1, 0, work_us=1 << 32),
        Message(Kind.ORDER, 0, 0x8000, rows=(SettingRow(0, -1, 0, 0.5),)),
        Message(Kind.ORDER, 0, 0x8000, rows=(SettingRow(0, 1, 0, 1e39),)),
    ],
    ids=["rows", "ops", "token", "slot", "txn", "dest", "rows of a kind without", "work", "setting", "real"],
)
def test_what_does_not_fit_is_our_own_fault(message: Message) -> None:
    with pytest.raises(LocalProtocolError):
        encode(message)


def test_most_rows_and_operations_fit() -> None:
    message = Message(
        Kind.RUN, 0, 1, rows=(Row(-1, 2, 3, 4),) * MAX_ROWS, ops=(SlotOp(SlotOpKind.RELEASE, 1, 2),) * MAX_OPS
    )
    assert decode(encode(message)) == message
    assert decode(memoryview(encode(message))) == message


@pytest.mark.parametrize("at", [0, 2, 3], ids=["magic", "version", "kind"])
def test_a_foreign_header_is_refused(at: int) -> None:
    data = bytearray(encode(Message(Kind.CREDIT, 1, 0)))
    data[at] = 0xEE
    with pytest.raises(RemoteProtocolError):
        decode(bytes(data))


def test_only_advice_is_control() -> None:
    control = {kind for kind in Kind if Message(kind, 0, 1).is_control}
    assert control == {Kind.CANCEL, Kind.PROBE, Kind.STATUS, Kind.FAILED}


def test_edges_count_per_peer_and_ignore_control() -> None:
    sender, taker = Edges(1), Edges(2)
    assert [sender.stamp(2), sender.stamp(3), sender.stamp(2)] == [1, 1, 2]
    taker.check(Message(Kind.RUN, 1, 2, txn=1))
    taker.check(Message(Kind.CANCEL, 1, 2, txn=0))
    taker.check(Message(Kind.RUN, 1, 2, txn=2))
    taker.check(Message(Kind.SHUTDOWN, 0, 2, txn=1))
    assert taker.taken == 3


@pytest.mark.parametrize("txn", [0, 1, 3])
def test_a_repeated_or_lost_transaction_is_refused(txn: int) -> None:
    taker = Edges(2)
    taker.check(Message(Kind.RUN, 1, 2, txn=1))
    with pytest.raises(RemoteProtocolError, match="expected transaction 2 from stage 0"):
        taker.check(Message(Kind.RUN, 1, 2, Flag.NONE, txn=txn))
