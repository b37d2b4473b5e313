"""The muster: while ranks check and load, each tells another that it makes progress; who makes none is named.

Ranks of a job that MPI has joined wait for each other: for the head's verdict, then until all have loaded. A rank that
is stopped, swapped out or waits for a dead disk would keep all of them for ever. So every rank sends a pulse twice a
second, with a number that grows while it reads or computes (see watch.py). Rank 0 watches the others, and rank 1
watches rank 0. A rank whose main thread is busy beats from a second one, which MPI must allow.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import numpy as np

from launch.watch import Pulse, Watch, progress
from pipeinfer.core.errors import StallError

PULSE_S = 0.5
MOST_UNSENT = 64
"""Pulses that nobody has taken; more are not sent."""
DOING = ("checking", "loading", "waiting", "done")


class Muster:
    """The muster of ``comm``, which is its own. ``names`` are those of all ranks. ``timeout_s``: see Watch.
    ``may_beat``: whether a second thread may call MPI. ``fail`` ends the job."""

    def __init__(
        self,
        comm: Any,
        names: list[str],
        timeout_s: float,
        may_beat: bool,
        fail: Callable[[BaseException], NoReturn],
    ) -> None:
        self._comm, self._may_beat, self._fail = comm, may_beat, fail
        rank, size = comm.Get_rank(), comm.Get_size()
        # Only who watches it hears it: what nobody receives would turn up in the next communicator of that number.
        self._leaders = [leader for leader in ([0] if rank else [1]) if leader < size]
        self._watch = Watch(timeout_s)
        now = time.monotonic()
        for other in {0: range(1, size), 1: range(1)}.get(rank, range(0)):
            self._watch.expect(other, names[other], now)
        self._doing = "checking"
        self._beats = 0
        self._next_s = now
        self._sends: deque[tuple[Any, Any]] = deque()

    def busy(self, doing: str) -> AbstractContextManager[None]:
        """While the main thread works inside the ``with`` and calls no MPI: beat for it."""
        self._doing = doing
        return Pulse(self._beat, PULSE_S) if self._may_beat else nullcontext()

    def _beat(self) -> None:
        try:
            # Who checks may wait for a person's words, as long as that takes: that it is there is enough.
            self._poll(progress() if self._doing == "loading" else self._count())
        except StallError as error:
            self._fail(error)

    def poll(self) -> None:
        """Beat for a main thread that waits, and hear the others. Raises StallError, which names who makes no
        progress."""
        self._doing = "waiting"
        self._poll(self._count())

    def _count(self) -> int:
        self._beats += 1
        return self._beats

    def _poll(self, moved: int) -> None:
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + PULSE_S
        while self._sends and self._sends[0][0].Test():
            self._sends.popleft()
        if len(self._sends) < MOST_UNSENT:
            self._send(moved)
        self._hear(now)
        if self._may_beat:
            self._watch.check(now)

    def _send(self, moved: int) -> None:
        for leader in self._leaders:
            words = np.array([moved, DOING.index(self._doing)], np.int64)
            self._sends.append((self._comm.Isend(words, leader), words))

    def _hear(self, now: float) -> None:
        words = np.empty(2, np.int64)
        for other in range(self._comm.Get_size()):
            while not self._watch.is_over and self._comm.Iprobe(other):
                self._comm.Recv(words, other)
                if DOING[words[1]] == "done":
                    self._watch.done(other)
                else:
                    self._watch.heard(other, int(words[0]), DOING[words[1]], now)

    def wait(self, pause: Callable[[], None]) -> None:
        """This rank is ready: say so, and wait for those that it watches, with a ``pause`` between looks. Raises
        StallError."""
        self._doing = "done"
        self._send(0)
        while not self._watch.is_over:
            now = time.monotonic()
            self._hear(now)
            if self._may_beat:
                self._watch.check(now)
            pause()
        for request, _ in self._sends:
            while not request.Test():
                pause()
        self._comm.Free()
