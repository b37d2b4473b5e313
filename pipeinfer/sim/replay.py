"""What is written down comes back the same: a message from its bytes (L7), a role's commands from a trace (L9)."""

from __future__ import annotations

import struct
from collections import deque

from pipeinfer.core.addresses import ORCHESTRATOR
from pipeinfer.core.messages import Body, Calibrate, DraftOrder, Message, Nodes, Result, Run
from pipeinfer.core.ports import Command, Event, Received, Send
from pipeinfer.core.wire import decode, encode
from pipeinfer.runtime.replay import retell
from pipeinfer.runtime.trace import Step
from pipeinfer.sim.history import InvariantBroken
from pipeinfer.sim.world import Checker, World, WorldSpec, make_machines


class Recorder(Checker):
    """Keeps the trace of a world."""

    def __init__(self) -> None:
        self.trace: list[Step] = []

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        self.trace.append(Step(address, event, now, tuple(commands)))


def replay(spec: WorldSpec, trace: list[Step]) -> None:
    """Give the events of ``trace`` to fresh machines of ``spec``; InvariantBroken at the first difference."""
    retold = retell({machine.address: machine for machine in make_machines(spec)}, trace)
    if retold.difference:
        raise InvariantBroken(f"L9: {retold.difference}")


class Wire(Checker):
    """L7. Probabilities travel in 32 bits; all else must come back as it was."""

    def __init__(self) -> None:
        self._sent: deque[Message] = deque()
        self._payloads: dict[tuple[int, int, int], tuple[int, bytes]] = {}

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        for command in commands:
            if not isinstance(command, Send):
                continue
            message = command.message
            if world.home[message.dest] == world.home[address]:
                _same(message, decode(encode(message)))  # it does not travel, but in another world it would
            else:
                self._sent.append(message)
            if command.payload is not None:
                self._payloads[address, message.dest, message.txn] = (message.payload_rows, command.payload.tobytes())
        if isinstance(event, Received) and isinstance(event.message.body, Run) and event.message.source != ORCHESTRATOR:
            self._arrive(event)

    def _arrive(self, event: Received) -> None:
        message = event.message
        rows, left = self._payloads.pop((message.source, message.dest, message.txn), (0, b""))
        arrived = b"" if event.payload is None else event.payload.tobytes()
        if arrived != left or rows != message.payload_rows or bool(arrived) != bool(rows):
            raise InvariantBroken(f"L7: the activations of {message.kind} {message.txn} did not arrive as they left")

    def on_message(self, world: World, message: Message, now: float) -> None:
        """See Checker."""
        _same(self._sent.popleft(), message)


def _same(sent: Message, arrived: Message) -> None:
    is_same = type(sent.body) is type(arrived.body) and sent._replace(body=_in_32_bits(sent.body)) == arrived
    if not is_same:
        raise InvariantBroken(f"L7: sent {sent}, arrived {arrived}")


def _in_32_bits(body: Body) -> Body:
    """``body`` with its probabilities in 32 bits; settings travel in 64."""
    match body:
        case Result(rows=rows):
            return body._replace(rows=tuple(row._replace(logp=_real_32(row.logp)) for row in rows))
        case Nodes(nodes=nodes):
            return body._replace(nodes=tuple(node._replace(logp=_real_32(node.logp)) for node in nodes))
        case DraftOrder(cutoff=cutoff):
            return body._replace(cutoff=_real_32(cutoff))
        case Calibrate(slope=slope, offsets=offsets):
            return body._replace(slope=_real_32(slope), offsets=tuple(map(_real_32, offsets)))
    return body


def _real_32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
