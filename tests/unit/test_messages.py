from __future__ import annotations

import pytest

from pipeinfer.core.addresses import address_name, drafter_address, stage_address
from pipeinfer.core.edges import Edges
from pipeinfer.core.errors import LocalProtocolError, RemoteProtocolError
from pipeinfer.core.messages import (
    MAX_BIASES,
    MAX_GRAMMAR,
    MAX_OPS,
    MAX_ROWS,
    MAX_TOP,
    Body,
    Cancel,
    Cancelled,
    Credit,
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
    accepted_name,
    fault_layer,
    fault_token,
)
from pipeinfer.core.wire import ENVELOPE, LAYOUTS, MAX_NBYTES, decode, encode, wire_nbytes

ROW, OP = Row(1, 2, 3, 4, 5), SlotOp(SlotOpKind.COMMIT, 1, 1, 1, 5)
RESULT_ROW, TOP = ResultRow(1, 2, 3, -0.5), TopToken(1, -0.5)


def test_sizes_are_what_the_format_says() -> None:
    assert len(encode(Message(1, 0, Shutdown()))) == ENVELOPE.size == 16
    assert len(encode(Message(1, 0, Credit(1)))) == 16 + 12
    run = Message(0, 1, Run(1, ops=(OP,) * 3, rows=(ROW,) * 5))
    assert len(encode(run)) == wire_nbytes(run) == 16 + 21 + 16 * 3 + 20 * 5
    assert wire_nbytes(Message(0, 1, Run(1, rows=(ROW,) * 5, next_tokens=(1,) * 5))) == 16 + 21 + 24 * 5


def test_addresses_have_names() -> None:
    assert [address_name(a) for a in (0, stage_address(0), stage_address(11), drafter_address(2))] == [
        "orchestrator", "stage 0", "stage 11", "drafter 2",
    ]  # fmt: skip


def test_accepted_names_never_meet_a_drafters_own() -> None:
    assert accepted_name(0) == 0x80000000
    assert accepted_name(77) - accepted_name(0) == 77


def test_what_stands_for_a_faulty_row_is_no_token_and_names_the_layer() -> None:
    assert [fault_layer(fault_token(layer)) for layer in (0, 1, 80)] == [0, 1, 80]
    assert all(fault_token(layer) < 0 for layer in (0, 1, 80))
    assert (fault_layer(0), fault_layer(7)) == (None, None)


@pytest.mark.parametrize(
    "message",
    [
        Message(0, 1, Run(1, rows=(ROW,) * (MAX_ROWS + 1))),
        Message(0, 1, Run(1, ops=(OP,) * (MAX_OPS + 1))),
        Message(0, 1, Run(1, rows=(ROW._replace(token=1 << 31),))),
        Message(0, 1, Run(1, rows=(ROW._replace(slot=-1),))),
        Message(0, 1, Run(1, rows=(ROW._replace(sequence=1 << 32),))),
        Message(0, 1, Run(1, ops=(OP._replace(length=1 << 16),))),
        Message(0, 1, Run(1), txn=1 << 32),
        Message(0, 1 << 16, Run(1)),
        Message(0, 1, Run(1), payload_nbytes=1 << 32),
        Message(0, 1, Run(1, rows=(ROW,) * 2, next_tokens=(1,))),
        Message(1, 0, Result(1, work_us=1 << 32)),
        Message(1, 0, Result(1, rows=(RESULT_ROW,) * 2, top=(TOP,) * 3)),
        Message(1, 0, Result(1, top=(TOP,))),
        Message(0, 0x8000, DraftOrder(1, passes=-1)),
        Message(0, 0x8000, DraftOrder(1, cutoff=1e39)),
        Message(0, 1, Settings(1, seed=1 << 64)),
        Message(0, 1, Settings(1, logit_bias=(TokenBias(1, -0.5),) * (MAX_BIASES + 1))),
        Message(0, 1, Settings(1, grammar=(123,) * (MAX_GRAMMAR + 1))),
        Message(0, 1, Settings(1, grammar=(256,))),
        Message(0, 0x8000, Prompt(1, 9, True, (1,) * (MAX_ROWS + 1))),
    ],
    ids=[
        "rows", "ops", "token", "slot", "sequence", "length", "txn", "dest", "payload", "next", "work", "top",
        "top alone", "passes", "real", "seed", "biases", "grammar", "byte", "prompt",
    ],
)  # fmt: skip
def test_what_does_not_fit_is_our_own_fault(message: Message) -> None:
    with pytest.raises(LocalProtocolError):
        encode(message)


@pytest.mark.parametrize(
    "body",
    [
        Run(1, rows=(ROW._replace(token=-1),) * MAX_ROWS, ops=(SlotOp(SlotOpKind.RELEASE, 1, 2),) * MAX_OPS),
        Result(1, rows=(RESULT_ROW._replace(top_count=MAX_TOP),) * MAX_ROWS, top=(TOP,) * (MAX_TOP * MAX_ROWS)),
        Settings(1, logit_bias=(TokenBias(1, -0.5),) * MAX_BIASES, grammar=(255,) * MAX_GRAMMAR),
    ],
)
def test_most_rows_and_operations_fit(body: Body) -> None:
    message = Message(0, 1, body)
    data = encode(message)
    assert decode(data) == decode(memoryview(data)) == message
    assert len(data) <= MAX_NBYTES


@pytest.mark.parametrize("at", [0, 2, 3], ids=["magic", "version", "kind"])
def test_a_foreign_envelope_is_refused(at: int) -> None:
    data = bytearray(encode(Message(1, 0, Credit(1))))
    data[at] = 0xEE
    with pytest.raises(RemoteProtocolError):
        decode(bytes(data))


def test_only_advice_is_control() -> None:
    bodies = [layout.make([0] * layout.numbers, [()] * len(layout.lists)) for layout in LAYOUTS.values()]
    control = {type(body) for body in bodies if Message(0, 1, body).is_control}
    assert control == {Cancel, Probe, Status, Failed}


def test_a_message_says_its_kind_and_how_many_rows_its_tensor_has() -> None:
    messages = [Message(0, 1, body) for body in (Run(1, rows=(ROW,) * 3), Cancel(rows=(Cancelled(1, 2),)), Nodes(1, 2))]
    assert [(one.kind, one.payload_rows) for one in messages] == [("Run", 3), ("Cancel", 0), ("Nodes", 0)]


def test_edges_count_per_peer_and_ignore_control() -> None:
    sender, taker = Edges(1), Edges(2)
    sent = [sender.message(dest, Run(1)) for dest in (2, 3, 2)]
    assert [(one.source, one.dest, one.txn) for one in sent] == [(1, 2, 1), (1, 3, 1), (1, 2, 2)]
    assert all(one.body == Run(1) and type(one.body) is Run for one in sent)
    taker.check(Message(1, 2, Run(1), txn=1))
    taker.check(Message(1, 2, Cancel(), txn=0))
    taker.check(Message(1, 2, Run(2), txn=2))
    taker.check(Message(0, 2, Shutdown(), txn=1))
    assert taker.taken == 3


@pytest.mark.parametrize("txn", [0, 1, 3])
def test_a_repeated_or_lost_transaction_is_refused(txn: int) -> None:
    taker = Edges(2)
    taker.check(Message(1, 2, Run(1), txn=1))
    with pytest.raises(RemoteProtocolError, match=r"expected transaction 2 from stage 0, got \d \(Hello\)"):
        taker.check(Message(1, 2, Hello(2), txn=txn))
