"""Words between a job and whoever started it: JSON objects, one a line, over a socket."""

from __future__ import annotations

import json
import select
import socket
from typing import Any


class Lines:
    """One end of ``wire``, which whoever opened it closes.

    Not a text file over the socket: writing to one of those throws away what it has read ahead, and ``select`` does not
    see what that is."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire
        self._ahead = b""  # what has arrived and was not heard yet

    def say(self, words: dict[str, Any]) -> None:
        """Send ``words``. Raises ConnectionError where nobody listens."""
        self._wire.sendall(json.dumps(words).encode() + b"\n")

    def hear(self) -> dict[str, Any] | None:
        """The next words, waited for; None if the other end is gone."""
        while b"\n" not in self._ahead:
            try:
                arrived = self._wire.recv(1 << 16)
            except ConnectionError:
                arrived = b""
            if not arrived:
                return None
            self._ahead += arrived
        line, _, self._ahead = self._ahead.partition(b"\n")
        words: dict[str, Any] = json.loads(line)
        return words

    @property
    def is_spoken_to(self) -> bool:
        """Whether there is something to hear, be it that the other end is gone."""
        return b"\n" in self._ahead or bool(select.select([self._wire], [], [], 0)[0])
