"""The driver: one rank's loop. It receives messages, computes one layer, and repeats; without either it sleeps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

from launch.backoff import Clock, sleep_until
from launch.doorbell import Doorbell
from pipeinfer.core.errors import StallError
from pipeinfer.core.ports import Event, Output, Send, Transport
from pipeinfer.runtime.executor import Executor

MOST_IDLE_S = 50e-3
"""Longest wait between polls without a doorbell; a poll takes a busy host a tenth of a millisecond."""


class Driver:
    """Runs an executor's machines against a transport (None for a rank that is alone) and a ``clock``."""

    def __init__(self, rank_of_role: Mapping[int, int], transport: Transport | None, clock: Clock = time) -> None:
        self._clock = clock
        self._rank_of_role = rank_of_role
        self._transport = transport
        self._due = 0.0  # when the current layer's rest is over
        self._overslept_s = 0.0
        self._bell = Doorbell() if transport is None else None  # a rank that is alone is woken by its own threads
        if self._bell is not None:
            self._bell.meet({0: self._bell.name})
        self.moved_at = self._clock.monotonic()
        self.executor: Executor  # set by the Job that creates the roles
        self.outputs: deque[tuple[float, Output]] = deque()

    def send(self, command: Send, now: float) -> None:
        """Outlet: send to the rank of the receiving role."""
        assert self._transport is not None, "a rank that is alone sends nothing"
        self._transport.send(self._rank_of_role[command.message.dest], command.message, command.payload)

    def tell(self, command: Output, now: float) -> None:
        """Outlet: output for the head's program, with its time."""
        self.outputs.append((now, command))

    def deliver(self, address: int, event: Event) -> None:
        """Hand a role an event from outside."""
        self.moved_at = self._clock.monotonic()
        self.executor.deliver(address, event, self.moved_at)

    def turn(self) -> None:
        """One turn of the loop."""
        now = self._clock.monotonic()
        moved = False
        if self._transport is not None:
            for event in self._transport.poll():
                self.executor.deliver(event.message.dest, event, self._clock.monotonic())
                moved = True
        alarm = self.executor.alarm
        if alarm is not None and now >= alarm:
            self.executor.ring(now)
            moved = True
        moved |= self._step(self._clock.monotonic())
        if moved:
            self.moved_at = self._clock.monotonic()  # a layer may have taken long
            return
        idle_s = MOST_IDLE_S if alarm is None else min(MOST_IDLE_S, max(0.0, alarm - now))
        if self._bell is not None:
            self._bell.wait(idle_s)
        elif self._transport is not None:
            self._transport.wait(idle_s)

    def wake(self) -> None:
        """From any thread: end the wait of a turn."""
        if self._bell is not None:
            self._bell.ring(0)
        elif self._transport is not None:
            self._transport.wake()

    def close(self) -> None:
        """Release the resources of waiting."""
        if self._bell is not None:
            self._bell.close()

    def _step(self, now: float) -> bool:
        """Compute the next layer; whether there was one. A paced layer is slept through without receiving messages,
        like a real layer; it begins when the last one should have ended, also across passes, for no real machine
        oversleeps."""
        rest_s = self.executor.step(now)
        if rest_s is None:
            self._overslept_s = self._due = 0.0
            return False
        if rest_s:
            self._due = (self._due or now - self._overslept_s) + rest_s
            sleep_until(self._due, self._clock)
        else:
            self._overslept_s = now - self._due if self._due else 0.0
            self._due = 0.0
        return True

    def run(self, until: Callable[[], bool], deadline_s: float = 0.0, explain: Callable[[], str] = str) -> None:
        """Turn until ``until()``. Raises StallError with the text ``explain()`` if nothing moves for ``deadline_s`` (0:
        never), unless the text is empty."""
        self.moved_at = self._clock.monotonic()
        while not until():
            self.turn()
            if deadline_s and self._clock.monotonic() - self.moved_at > deadline_s:
                if report := explain():
                    raise StallError(report)
                self.moved_at = self._clock.monotonic()
