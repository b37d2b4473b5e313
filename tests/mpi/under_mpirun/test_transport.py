"""The MPI transport by itself: order per sender, payloads that belong to their messages, control that overtakes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from launch import mpi
from launch.backoff import Backoff
from launch.mpi import World
from launch.transport import MpiTransport
from pipeinfer.core.ports import Received
from pipeinfer.core.protocol import HEADER, MAX_OPS, MAX_ROWS, Kind, Message, Row, SlotOp, SlotOpKind
from tests.invariants.transport_worlds import Correspondent, Traffic

pytestmark = pytest.mark.mpi(min_size=2)

WINDOW = 3
"""Tensors of one sender that are on the way at most: the transport's promise holds within its window."""


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def transport(world: World) -> Iterator[MpiTransport]:
    transport = mpi.MpiTransport(
        world.comm, lambda array: array.view(np.uint8), lambda data, rows: data.view(np.int64), WINDOW
    )
    yield transport
    transport.close()


def collect(transport: MpiTransport, done: Callable[[list[Received]], bool]) -> list[Received]:
    events, backoff = list[Received](), Backoff()
    while not done(events):
        events += transport.poll()
        backoff.wait()
    return events


def run(number: int, source: int) -> Message:
    return Message(Kind.RUN, source, 1, txn=number, run=number, rows=(Row(number, 0, 0, 0),))


def test_every_sender_s_messages_arrive_in_order_with_their_own_payloads(world: World, transport: MpiTransport) -> None:
    """Everybody sends everybody: nothing, a few numbers, far more than any eager limit; far more than a window."""
    traffic = Traffic(seed=1, ranks=world.size, each=WINDOW, count=10 * WINDOW, sizes=(0, 3, 40_000, 0, 50_000))
    assert Correspondent(traffic, world.rank, transport, time).run() > 3 * (world.size - 1) * WINDOW


def test_the_largest_message_passes(world: World, transport: MpiTransport) -> None:
    ops = tuple(SlotOp(SlotOpKind.RELEASE, slot, 1, 0) for slot in range(MAX_OPS))
    rows = tuple(Row(-slot, slot, slot, slot) for slot in range(MAX_ROWS))
    message = Message(Kind.RUN, world.rank, 1, txn=1, run=1, ops=ops, rows=rows)
    if world.rank == world.size - 1:
        transport.send(0, message, None)
    elif world.is_head:
        (event,) = collect(transport, lambda events: len(events) == 1)
        assert (event.message.ops, event.message.rows) == (ops, rows)


def test_control_is_not_held_back_by_a_tensor_that_has_not_come(world: World, transport: MpiTransport) -> None:
    if world.rank == 1:
        # Announce a tensor without sending it, then a control message; the tensor follows only once that has arrived.
        transport._messages.Isend([_announcing(), HEADER.size], 0).Wait()  # type: ignore[attr-defined]
        transport.send(0, Message(Kind.CANCEL, 1, 0, rows=(Row(0, 7, 0, 0),)), None)
        collect(transport, lambda events: any(event.message.kind is Kind.PROBE for event in events))
        transport._tensors.Isend([np.arange(4).view(np.uint8), 32], 0).Wait()  # type: ignore[attr-defined]
    elif world.is_head:
        first = collect(transport, lambda events: bool(events))
        assert [event.message.kind for event in first] == [Kind.CANCEL]
        transport.send(1, Message(Kind.PROBE, 0, 1), None)
        (late,) = collect(transport, lambda events: bool(events))
        assert late.payload is not None
        assert late.payload.tolist() == [0, 1, 2, 3]


def _announcing() -> bytes:

    from pipeinfer.core.protocol import encode

    return encode(run(1, 1)._replace(rows=(), payload_nbytes=32))


def test_agreement_and_facts(world: World) -> None:
    assert world.agree(5 if world.is_head else 0) == 5
    facts = world.gather({"rank": world.rank, "name": "x" * world.rank})
    assert facts == ([{"rank": rank, "name": "x" * rank} for rank in range(world.size)] if world.is_head else [])
