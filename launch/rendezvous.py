"""Heartbeats while ranks check and load: each rank reports its progress, and a rank without progress is named.

Ranks of a job wait for each other: for rank 0's decision, then until all have loaded. A rank that is stopped, swapped
out or blocked on a disk would block all of them. So every rank sends a heartbeat twice a second, with a number that
grows while the rank reads or computes (see watch.py). Rank 0 watches the others, and rank 1 watches rank 0. A rank
whose main thread is busy sends heartbeats from a second thread, if MPI allows one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import numpy as np

from launch.watch import ProgressThread, Watch, progress
from pipeinfer.core.errors import StallError

PERIOD_S = 0.5
MOST_UNSENT = 64
"""Progress messages that no rank has received yet; no more than this are sent."""
DOING = ("checking", "loading", "waiting", "done")


class Rendezvous:
    """The rendezvous of the ranks of ``comm``, a communicator of its own. ``names`` are those of all ranks.
    ``timeout_s``: see Watch. ``may_thread``: whether a second thread may call MPI. ``fail`` ends the job."""

    def __init__(
        self,
        comm: Any,
        names: list[str],
        timeout_s: float,
        may_thread: bool,
        fail: Callable[[BaseException], NoReturn],
    ) -> None:
        self._comm, self._may_thread, self._fail = comm, may_thread, fail
        rank, size = comm.Get_rank(), comm.Get_size()
        # Only the watching rank is a receiver: a message that is never received would match in a later communicator.
        self._leaders = [leader for leader in ([0] if rank else [1]) if leader < size]
        self._watch = Watch(timeout_s)
        now = time.monotonic()
        for other in {0: range(1, size), 1: range(1)}.get(rank, range(0)):
            self._watch.expect(other, names[other], now)
        self._doing = "checking"
        self._reports = 0
        self._next_s = now
        self._sends: deque[tuple[Any, Any]] = deque()

    def busy(self, doing: str) -> AbstractContextManager[None]:
        """Send heartbeats while the main thread works inside the ``with`` and calls no MPI."""
        self._doing = doing
        return ProgressThread(self._report, PERIOD_S) if self._may_thread else nullcontext()

    def _report(self) -> None:
        try:
            # A check may wait for a person's answer, for any time: that the rank runs is enough.
            self._poll(progress() if self._doing == "loading" else self._count())
        except StallError as error:
            self._fail(error)

    def poll(self) -> None:
        """Report the progress of a main thread that waits, and receive that of others. Raises StallError, which names
        the ranks without progress."""
        self._doing = "waiting"
        self._poll(self._count())

    def _count(self) -> int:
        self._reports += 1
        return self._reports

    def _poll(self, moved: int) -> None:
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + PERIOD_S
        while self._sends and self._sends[0][0].Test():
            self._sends.popleft()
        if len(self._sends) < MOST_UNSENT:
            self._send(moved)
        self._receive(now)
        if self._may_thread:
            self._watch.check(now)

    def _send(self, moved: int) -> None:
        for leader in self._leaders:
            message = np.array([moved, DOING.index(self._doing)], np.int64)
            self._sends.append((self._comm.Isend(message, leader), message))

    def _receive(self, now: float) -> None:
        message = np.empty(2, np.int64)
        for other in range(self._comm.Get_size()):
            while not self._watch.is_over and self._comm.Iprobe(other):
                self._comm.Recv(message, other)
                if DOING[message[1]] == "done":
                    self._watch.done(other)
                else:
                    self._watch.heard(other, int(message[0]), DOING[message[1]], now)

    def wait(self, pause: Callable[[], None]) -> None:
        """This rank is ready: report it, and wait for those that it watches, with a ``pause`` between looks. Raises
        StallError."""
        self._doing = "done"
        self._send(0)
        while not self._watch.is_over:
            now = time.monotonic()
            self._receive(now)
            if self._may_thread:
                self._watch.check(now)
            pause()
        for request, _ in self._sends:
            while not request.Test():
                pause()
        self._comm.Free()
