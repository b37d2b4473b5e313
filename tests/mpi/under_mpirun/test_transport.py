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
from pipeinfer.core.messages import (
    MAX_OPS,
    MAX_ROWS,
    Cancel,
    Cancelled,
    Message,
    Probe,
    Row,
    Run,
    SlotOp,
    SlotOpKind,
)
from pipeinfer.core.ports import Received
from pipeinfer.core.wire import encode
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
        world.comm, world.node, lambda array: array.view(np.uint8), lambda data, rows: data.view(np.int64), WINDOW
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
    return Message(source, 1, Run(number, rows=(Row(number, 0, 0, 0),)), txn=number)


def test_every_sender_s_messages_arrive_in_order_with_their_own_payloads(world: World, transport: MpiTransport) -> None:
    """Everybody sends everybody: nothing, a few numbers, far more than any eager limit; far more than a window."""
    traffic = Traffic(seed=1, ranks=world.size, each=WINDOW, count=10 * WINDOW, sizes=(0, 3, 40_000, 0, 50_000))
    assert Correspondent(traffic, world.rank, transport, time).run() > 3 * (world.size - 1) * WINDOW


def test_the_largest_message_passes(world: World, transport: MpiTransport) -> None:
    ops = tuple(SlotOp(SlotOpKind.RELEASE, slot, 1, 0) for slot in range(MAX_OPS))
    rows = tuple(Row(-slot, slot, slot, slot) for slot in range(MAX_ROWS))
    message = Message(world.rank, 1, Run(1, ops=ops, rows=rows), txn=1)
    if world.rank == world.size - 1:
        transport.send(0, message, None)
    elif world.is_head:
        (event,) = collect(transport, lambda events: len(events) == 1)
        assert event.message == message._replace(source=world.size - 1)


def test_control_is_not_held_back_by_a_tensor_that_has_not_come(world: World, transport: MpiTransport) -> None:
    if world.rank == 1:
        # Announce a tensor without sending it, then a control message; the tensor follows only once that has arrived.
        announcing = encode(run(1, 1)._replace(payload_nbytes=32))
        transport._messages.Isend([announcing, len(announcing)], 0).Wait()  # type: ignore[attr-defined]
        transport.send(0, Message(1, 0, Cancel(rows=(Cancelled(7, 0),))), None)
        collect(transport, lambda events: any(type(event.message.body) is Probe for event in events))
        transport._tensors.Isend([np.arange(4).view(np.uint8), 32], 0).Wait()  # type: ignore[attr-defined]
    elif world.is_head:
        first = collect(transport, lambda events: bool(events))
        assert [type(event.message.body) for event in first] == [Cancel]
        transport.send(1, Message(0, 1, Probe()), None)
        (late,) = collect(transport, lambda events: bool(events))
        assert late.payload is not None
        assert late.payload.tolist() == [0, 1, 2, 3]


def test_agreement_and_facts(world: World) -> None:
    assert world.agree(5 if world.is_head else 0) == 5
    facts = world.gather({"rank": world.rank, "name": "x" * world.rank})
    assert facts == ([{"rank": rank, "name": "x" * rank} for rank in range(world.size)] if world.is_head else [])
