"""Paced links: real messages that leave only when an emulated link would have delivered them. Reports must
label such times as emulated."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from pipeinfer.core.links import Link, Wires
from pipeinfer.core.messages import Message
from pipeinfer.core.ports import Payload, Received, Transport


class _Held(NamedTuple):
    due: float
    rank: int
    message: Message
    payload: Payload | None


class PacedLinks:
    """``transport`` with the times of ``link``; a Transport itself. Loss, repetition and jitter are the simulator's."""

    def __init__(self, transport: Transport, link: Link) -> None:
        self._transport = transport
        self._link = link
        self._wires = Wires(link)
        self._streams: dict[int, deque[_Held]] = {}  # by destination; control messages do not queue behind them
        self._control: deque[_Held] = deque()

    def send(self, rank: int, message: Message, payload: Payload | None) -> None:
        """See Transport; what is handed over must stay as it is until it has left."""
        now = time.monotonic()
        if message.is_control:
            self._control.append(_Held(now + self._link.delay_s, rank, message, payload))
        else:
            due = self._wires.arrival(0, rank, self._link.nbytes(message, payload), now)
            self._streams.setdefault(rank, deque()).append(_Held(due, rank, message, payload))

    def poll(self) -> list[Received]:
        """See Transport."""
        self._release(time.monotonic())
        return self._transport.poll()

    def wait(self, most_s: float) -> None:
        """See Transport."""
        dues = [held[0].due for held in (self._control, *self._streams.values()) if held]
        self._transport.wait(min([most_s, *(max(0.0, due - time.monotonic()) for due in dues)]))

    def wake(self) -> None:
        """See Transport."""
        self._transport.wake()

    def _release(self, now: float) -> None:
        for held in (self._control, *self._streams.values()):
            while held and held[0].due <= now:
                self._transport.send(*held.popleft()[1:])

    def close(self) -> None:
        """Send what is held at once, and close the transport. Collective."""
        self._release(float("inf"))
        self._transport.close()

    @property
    def messages(self) -> int:
        """See Transport."""
        return self._transport.messages

    @property
    def nbytes(self) -> int:
        """See Transport."""
        return self._transport.nbytes
