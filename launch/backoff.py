"""Polite waiting: sleep between polls, so that many ranks can share few cores."""

from __future__ import annotations

import time

SHORTEST_S = 20e-6
LONG_S = 200e-6
LONGEST_S = 1e-3
QUIET_S = 0.5


class Backoff:
    """How long to sleep when nothing moves: 20 us, growing by half to 200 us, and to 1 ms after half a second."""

    def __init__(self) -> None:
        self._delay_s = SHORTEST_S
        self._quiet_since = 0.0

    def reset(self) -> None:
        """Something moved."""
        self._delay_s = SHORTEST_S
        self._quiet_since = 0.0

    def wait(self, most_s: float = 1.0) -> None:
        """Sleep a little, ``most_s`` at most."""
        now = time.monotonic()
        self._quiet_since = self._quiet_since or now
        time.sleep(min(self._delay_s, most_s))
        self._delay_s = min(self._delay_s * 1.5, LONG_S if now - self._quiet_since < QUIET_S else LONGEST_S)
