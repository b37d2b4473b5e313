"""The executor: carries out what the machines of one rank command, one layer at a time.

Both drivers use it. A driver over real processes gives it a transport and the wall clock; the simulator gives it a
network and a clock of its own. It decides nothing: it hands events to machines, keeps one computation running, and
stops between layers so that whoever drives it can let messages in.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.ports import (
    Abandon,
    Command,
    Compute,
    Computed,
    Event,
    Halt,
    Machine,
    Note,
    Output,
    Payload,
    Received,
    SampledToken,
    Send,
    ShardModel,
    Wake,
    Woke,
)
from pipeinfer.runtime.trace import raised

SCORED_ROWS = 32
"""Prompt rows that go through the output head at a time, where their log-probabilities are wanted: all logits of a row
are kept until then, 20 MB for 32 rows of 152,000 tokens."""


class Outlet(Protocol):
    """Where commands that leave the rank go."""

    def send(self, command: Send, now: float) -> None:
        """A message for a role on another rank."""
        ...

    def tell(self, command: Output, now: float) -> None:
        """Outputs for whoever submitted the request."""
        ...


Observer = Callable[[int, Event, float, list[Command]], None]
"""Called after every event: which role, what happened, when, what it commanded (a Note, if it raised instead)."""


@dataclass(slots=True)
class _Job:
    address: int
    compute: Compute
    passes: Generator[float, None, Payload] | None = None
    abandoned: bool = False
    began: float = 0.0


class Executor:
    """The machines of one rank and their shards, by address.

    ``clock`` tells the time after a layer was computed; without one no time passes in it (the simulator's layers)."""

    def __init__(
        self,
        machines: Sequence[Machine],
        shards: Mapping[int, ShardModel],
        outlet: Outlet,
        observer: Observer | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._machines = {machine.address: machine for machine in machines}
        self._shards = shards
        self._outlet = outlet
        self._observer = observer
        self._clock = clock
        self._local: deque[tuple[int, Event]] = deque()
        self._jobs: dict[int, _Job] = {}  # at most one per role
        self._current: _Job | None = None
        self._alarms: dict[int, float] = {}  # at most one per role

    @property
    def addresses(self) -> list[int]:
        """The roles that play here."""
        return list(self._machines)

    @property
    def alarm(self) -> float | None:
        """When a role next wants to be woken."""
        return min(self._alarms.values(), default=None)

    @property
    def is_halted(self) -> bool:
        """Whether every role here has ended."""
        return not self._machines

    def deliver(self, address: int, event: Event, now: float) -> None:
        """Hand ``event`` to the role at ``address`` and carry out all that follows from it on this rank."""
        self._local.append((address, event))
        while self._local:
            address, event = self._local.popleft()
            machine = self._machines.get(address)
            if machine is None:
                continue  # it has halted: what comes late no longer matters
            try:
                commands = machine.handle(event, now)
            except Exception as error:
                if self._observer:
                    self._observer(address, event, now, [raised(error)])
                raise
            if self._observer:
                self._observer(address, event, now, commands)
            for command in commands:
                self._carry_out(address, command, now)

    def _carry_out(self, address: int, command: Command, now: float) -> None:
        if isinstance(command, Send):
            if command.message.dest in self._machines:
                self._local.append((command.message.dest, Received(command.message, command.payload)))
            else:
                self._outlet.send(command, now)
        elif isinstance(command, Compute):
            if address in self._jobs:
                raise LocalProtocolError(f"role {address} started job {command.job} during another one")
            self._jobs[address] = _Job(address, command)
        elif isinstance(command, Abandon):
            job = self._jobs.get(address)
            if job and job.compute.job == command.job:
                job.abandoned = True
        elif isinstance(command, Wake):
            self._alarms[address] = command.at
        elif isinstance(command, Halt):
            del self._machines[address]
            self._jobs.pop(address, None)
            self._alarms.pop(address, None)
        elif not isinstance(command, Note):  # a note is for whoever observes
            self._outlet.tell(command, now)

    def ring(self, now: float) -> None:
        """Wake the roles whose time has come."""
        due = [address for address, at in self._alarms.items() if at <= now]
        for address in due:
            # Waking one role may move another one's alarm on this rank, or end that role.
            if self._alarms.get(address, math.inf) <= now:
                del self._alarms[address]
                self.deliver(address, Woke(), now)

    def step(self, now: float) -> float | None:
        """Run the current computation up to its next layer boundary. Returns the seconds to rest before the next step,
        or None if there is nothing to compute."""
        if self._current is None or self._current.address not in self._jobs:
            if not self._jobs:
                self._current = None
                return None
            self._current = self._jobs[min(self._jobs)]  # target stages before drafters
        job = self._current
        shard = self._shards[job.address]
        if not job.abandoned:
            if job.passes is None:
                given, keep = job.compute.hidden, job.compute.keep
                if given is not None and keep is not None:
                    given = given[list(keep)]
                job.passes, job.began = shard.forward(job.compute.batch, given), now
            try:
                return next(job.passes)
            except StopIteration as done:
                found = (*self._outcome(job.compute, shard, done.value), dict(shard.faults))
        else:
            if job.passes is not None:
                job.passes.close()
            found = (None, None, {})
        del self._jobs[job.address]
        self._current = None
        ended = self._clock() if self._clock else now
        seconds = ended - job.began if job.passes else 0.0
        hidden, choices, faults = found
        self.deliver(job.address, Computed(job.compute.job, hidden, choices, seconds, faults), ended)
        return 0.0

    def _outcome(
        self, compute: Compute, shard: ShardModel, hidden: Payload
    ) -> tuple[Payload | None, list[list[SampledToken]] | None]:
        if compute.choices:
            return None, _choices(compute, shard, hidden)
        if compute.rows:
            raise LocalProtocolError("a computation wants choices after its rows, but no number of them")
        return hidden, None


def _choices(compute: Compute, shard: ShardModel, hidden: Payload) -> list[list[SampledToken]]:
    """What ``shard`` chooses after the rows of ``compute``, some rows at a time where that may need much memory."""
    draw, rows, found = compute.draw, compute.rows, list[list[SampledToken]]()
    if draw is None or not draw.given:
        return shard.sample(hidden, rows, compute.choices, draw)
    for first in range(0, len(rows), SCORED_ROWS):
        some = range(first, min(first + SCORED_ROWS, len(rows)))
        found += shard.sample(hidden, rows[first : some.stop], compute.choices, draw.of(some))
    return found
