"""Waiting with sleeps between polls, so that many ranks can share few cores."""

from __future__ import annotations

import contextlib
import ctypes
import time
from typing import Protocol

SHORTEST_S = 20e-6
LONG_S = 100e-6
LONGEST_S = 1e-3
QUIET_S = 5.0
PR_SET_TIMERSLACK = 29


class Clock(Protocol):
    """A clock in seconds with sleep: the module ``time``, or a virtual clock."""

    def monotonic(self) -> float:
        """The time; it never goes back."""
        ...

    def sleep(self, seconds: float, /) -> None:
        """Return so many seconds later."""
        ...


class Backoff:
    """The time between polls without progress: 20 us, growing by half to ``long_s``, and to 1 ms after five seconds."""

    def __init__(self, clock: Clock = time, long_s: float = LONG_S) -> None:
        self._clock = clock
        self._long_s = long_s
        _wake_on_time()
        self.reset()

    def reset(self) -> None:
        """There was progress."""
        self._delay_s = SHORTEST_S
        self._quiet_since = 0.0

    def next_s(self) -> float:
        """How long to sleep now, in seconds."""
        now, delay_s = self._clock.monotonic(), self._delay_s
        self._quiet_since = self._quiet_since or now
        self._delay_s = min(1.5 * delay_s, self._long_s if now - self._quiet_since < QUIET_S else LONGEST_S)
        return delay_s

    def wait(self) -> None:
        """Sleep a little."""
        self._clock.sleep(self.next_s())


def sleep_until(due: float, clock: Clock = time) -> None:
    """Sleep until ``clock`` reaches ``due``; not at all if it already has."""
    if (left_s := due - clock.monotonic()) > 0:
        clock.sleep(left_s)


def _wake_on_time() -> None:
    """Turn off Linux's timer slack in this thread, by which wakeups may be up to 50 us late."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
