"""A seeded network: delay, bandwidth and jitter on ordered channels; on CONTROL also loss, repetition and
overtaking."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pipeinfer.ports import Payload
from pipeinfer.protocol import HEADER, OP, ROW, Message


@dataclass(frozen=True, slots=True)
class Link:
    """Every pair of hosts has one. Times in seconds, bandwidth in bytes per second; probabilities per control
    message."""

    delay_s: float = 1e-5
    jitter_s: float = 0.0
    bandwidth: float = 1e9
    control_loss: float = 0.0
    control_repeat: float = 0.0


class Network:
    """Says when a message arrives: once, several times, or never."""

    def __init__(self, link: Link, rng: random.Random) -> None:
        self._link = link
        self._rng = rng
        self._free_at: dict[tuple[int, int], float] = {}  # when the wire of a pair of hosts is free again
        self._last_arrival: dict[tuple[int, int], float] = {}
        self.nbytes = 0
        self.messages = 0

    def arrivals(self, source: int, dest: int, message: Message, payload: Payload | None, now: float) -> list[float]:
        """The times at which hosts ``source`` sent ``message`` now and ``dest`` will have it."""
        nbytes = HEADER.size + OP.size * len(message.ops) + ROW.size * len(message.rows)
        nbytes += getattr(payload, "nbytes", 0)
        self.nbytes += nbytes
        self.messages += 1
        link, rng = self._link, self._rng
        if message.is_control:
            if rng.random() < link.control_loss:
                return []
            copies = 2 if rng.random() < link.control_repeat else 1
            return [now + link.delay_s + rng.random() * 3 * link.jitter_s for _ in range(copies)]
        pair = (source, dest)
        left = max(now, self._free_at.get(pair, 0.0)) + nbytes / link.bandwidth
        self._free_at[pair] = left
        arrival = max(left + link.delay_s + rng.random() * link.jitter_s, self._last_arrival.get(pair, 0.0))
        self._last_arrival[pair] = arrival
        return [arrival]
