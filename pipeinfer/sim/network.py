"""A seeded network: links with jitter on ordered channels; on CONTROL also loss, repetition and overtaking."""

from __future__ import annotations

import random

from pipeinfer.core.links import Link, Wires
from pipeinfer.core.messages import Message
from pipeinfer.core.ports import Payload


class Network:
    """Computes when a message arrives: once, several times, or never."""

    def __init__(self, link: Link, rng: random.Random) -> None:
        self._link = link
        self._rng = rng
        self._wires = Wires(link)
        self._last_arrival: dict[tuple[int, int], float] = {}
        self.nbytes = 0
        self.messages = 0

    def arrivals(self, source: int, dest: int, message: Message, payload: Payload | None, now: float) -> list[float]:
        """The times at which hosts ``source`` sent ``message`` now and ``dest`` will have it."""
        link, rng = self._link, self._rng
        nbytes = self.size(message, payload)
        self.nbytes += nbytes
        self.messages += 1
        if message.is_control:
            if rng.random() < link.control_loss:
                return []
            copies = 2 if rng.random() < link.control_repeat else 1
            return [now + link.delay_s + rng.random() * 3 * link.jitter_s for _ in range(copies)]
        pair = (source, dest)
        arrival = self._wires.arrival(source, dest, nbytes, now) + rng.random() * link.jitter_s
        arrival = self._last_arrival[pair] = max(arrival, self._last_arrival.get(pair, 0.0))
        return [arrival]

    def size(self, message: Message, payload: Payload | None) -> int:
        """The bytes that ``message`` and its ``payload`` take on the wire."""
        return self._link.nbytes(message, payload)
