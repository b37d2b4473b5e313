"""What is written down comes back the same: a message from its bytes (law L7), a role's commands from a trace (law L9).

So a trace from anywhere, a simulated world or a real rank, can be taken home and debugged; and a machine that looks at
a clock, a seedless random number or the order of a set is found out.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

from pipeinfer.ports import Command, Event, Received, Send
from pipeinfer.protocol import ORCHESTRATOR, AnyRow, Kind, Message, Row, SettingRow, address_name, decode, encode
from pipeinfer.sim.chronicle import LawBroken
from pipeinfer.sim.world import Witness, World, WorldSpec, make_machines


@dataclass(frozen=True, slots=True)
class Step:
    """One event of one role, and what the role commanded."""

    address: int
    event: Event
    now: float
    commands: tuple[Command, ...]


class Recorder(Witness):
    """Keeps the trace of a world."""

    def __init__(self) -> None:
        self.trace: list[Step] = []

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Witness."""
        self.trace.append(Step(address, event, now, tuple(commands)))


def replay(spec: WorldSpec, trace: list[Step]) -> None:
    """Tell fresh machines of ``spec`` all that ``trace`` told the old ones; LawBroken at the first difference."""
    machines = {machine.address: machine for machine in make_machines(spec)}
    for number, step in enumerate(trace):
        commands = machines[step.address].handle(step.event, step.now)
        what = difference(step.commands, tuple(commands))
        if what:
            event = type(step.event).__name__
            raise LawBroken(f"L9: {address_name(step.address)} answers event {number} ({event}) differently: {what}")


def difference(old: Any, new: Any, path: str = "commands") -> str:
    """Where and how ``new`` differs from ``old``; empty if it does not."""
    if old is new:
        return ""
    if type(old) is not type(new):
        return f"{path} was {old!r}, is {new!r}"
    if isinstance(old, np.ndarray):
        same = old.shape == new.shape and old.dtype == new.dtype and old.tobytes() == new.tobytes()
        return "" if same else f"{path} was {old.tolist()}, is {new.tolist()}"
    if isinstance(old, Message):
        return "" if old == new else f"{path} was {old}, is {new}"
    if is_dataclass(old):
        parts = [(field.name, getattr(old, field.name), getattr(new, field.name)) for field in fields(old)]
    elif isinstance(old, tuple | list) and len(old) == len(new):
        parts = [(str(index), was, now) for index, (was, now) in enumerate(zip(old, new, strict=True))]
    else:
        return "" if old == new else f"{path} was {old!r}, is {new!r}"
    return next((found for name, was, now in parts if (found := difference(was, now, f"{path}.{name}"))), "")


class Wire(Witness):
    """L7. Probabilities travel in 32 bits; all else must come back as it was."""

    def __init__(self) -> None:
        self._sent: deque[Message] = deque()
        self._payloads: dict[tuple[int, int, int], tuple[int, bytes]] = {}

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Witness."""
        for command in commands:
            if not isinstance(command, Send):
                continue
            message = command.message
            if world.home[message.dest] == world.home[address]:
                _same(message, decode(encode(message)))  # it does not travel, but in another world it would
            else:
                self._sent.append(message)
            if command.payload is not None:
                self._payloads[address, message.dest, message.txn] = (len(message.rows), command.payload.tobytes())
        if isinstance(event, Received) and event.message.kind is Kind.RUN and event.message.source != ORCHESTRATOR:
            self._arrive(event)

    def _arrive(self, event: Received) -> None:
        message = event.message
        rows, left = self._payloads.pop((message.source, message.dest, message.txn), (0, b""))
        arrived = b"" if event.payload is None else event.payload.tobytes()
        if arrived != left or rows != len(message.rows) or bool(arrived) != bool(rows):
            raise LawBroken(f"L7: the activations of run {message.run} did not arrive as they left")

    def on_message(self, world: World, message: Message, now: float) -> None:
        """See Witness."""
        _same(self._sent.popleft(), message)


def _same(sent: Message, arrived: Message) -> None:
    if sent != arrived and replace(sent, rows=tuple(_in_32_bits(row) for row in sent.rows)) != arrived:
        raise LawBroken(f"L7: sent {sent}, arrived {arrived}")


def _in_32_bits(row: AnyRow) -> AnyRow:
    if isinstance(row, Row):
        return row
    if isinstance(row, SettingRow):
        return row._replace(value=_real_32(row.value))
    return row._replace(logp=_real_32(row.logp))


def _real_32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
