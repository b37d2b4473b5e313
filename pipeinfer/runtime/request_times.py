"""When each request of a job waited, was prefilled, was decoded and was preempted, from the orchestrator's trace.

A request becomes a sequence when its Settings leave for the first stage. Settings do not name the request, but the
orchestrator begins requests in one order only: the lowest priority first, then by arrival, and a preempted request
keeps its place. A Note tells of a preemption.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipeinfer.core.addresses import FIRST_STAGE, ORCHESTRATOR
from pipeinfer.core.messages import Settings
from pipeinfer.core.ports import Command, Emit, Event, Finish, Idle, Note, Request, RequestStats, Send, Submitted
from pipeinfer.runtime.trace import Step

PREEMPT = re.compile(r"preempt request (\d+)")
"""The orchestrator's Note about a preemption, with the caller's number of the request."""


class Phase(enum.StrEnum):
    """What becomes of a request until its last token."""

    WAITING = "waiting"
    PREFILL = "prefill"  # from its Settings to the first token of the sequence
    DECODING = "decoding"
    PREEMPTED = "preempted"  # waits again, without slots


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """A ``phase`` of a request, in seconds from the first event of the job."""

    phase: Phase
    began_s: float
    ended_s: float


@dataclass(slots=True, eq=False)
class RequestTimes:
    """What the trace tells of one request. ``number``: the caller's; ``arrival``: how many were submitted before it.

    ``sequence``: the last one it was, 0 before it was one. ``emitted``: when so many tokens became final. ``reason``
    and ``stats``: of its end, if the trace has it."""

    number: int
    arrival: int
    request: Request
    submitted_s: float
    sequence: int = 0
    text: list[int] = field(default_factory=list)  # all tokens that were emitted
    phases: list[PhaseSpan] = field(default_factory=list)
    emitted: list[tuple[float, int]] = field(default_factory=list)
    reason: str = ""
    stats: RequestStats | None = None
    phase: Phase | None = Phase.WAITING  # the one under way
    since_s: float = 0.0

    @property
    def ttft_s(self) -> float | None:
        """Seconds from its submission to its first token; None without a token."""
        return self.emitted[0][0] - self.submitted_s if self.emitted else None

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens after the first emission; None where there is none."""
        if not self.emitted or self.emitted[-1][0] <= self.emitted[0][0]:
            return None
        return (len(self.text) - self.emitted[0][1]) / (self.emitted[-1][0] - self.emitted[0][0])

    @property
    def ended_s(self) -> float:
        """When its last phase ended."""
        return self.phases[-1].ended_s if self.phases else self.submitted_s

    @property
    def preemptions(self) -> int:
        """How often it lost its slots."""
        return sum(span.phase is Phase.PREEMPTED for span in self.phases)

    def enter(self, phase: Phase | None, at_s: float) -> None:
        """``phase`` begins, or with None the last one ends."""
        if self.phase is not None and phase is not self.phase:
            self.phases.append(PhaseSpan(self.phase, self.since_s, at_s))
            self.phase, self.since_s = phase, at_s


class RequestReader:
    """Takes what the orchestrator was told and commanded, in order. ``requests``: all, in the order of submission."""

    def __init__(self) -> None:
        self.requests: list[RequestTimes] = []
        self._by_number: dict[int, RequestTimes] = {}  # the latest of that number
        self._by_sequence: dict[int, RequestTimes] = {}
        self._waiting: list[RequestTimes] = []  # and preempted

    def number_of(self, sequence: int) -> int | None:
        """The caller's number of the request that is or was ``sequence``; None if none was."""
        request = self._by_sequence.get(sequence)
        return None if request is None else request.number

    def hear(self, event: Event, at_s: float) -> None:
        """The orchestrator was told ``event``."""
        if isinstance(event, Submitted):
            request = RequestTimes(event.number, len(self.requests), event.request, at_s, since_s=at_s)
            self.requests.append(request)
            self._waiting.append(request)
            self._by_number[event.number] = request

    def carry_out(self, command: Command, at_s: float) -> RequestTimes | None:
        """It commanded ``command``: the request whose sequence begins (Settings), has tokens (Emit) or ends (Finish,
        Note) by it, if there is one."""
        if isinstance(command, Send):
            message = command.message
            if isinstance(message.body, Settings) and message.dest == FIRST_STAGE and self._waiting:
                return self._begin(message.body.sequence, at_s)
        elif isinstance(command, Emit | Finish | Idle):
            request = self._by_number.get(command.number)
            if request is not None:
                return self._tell(request, command, at_s)
        elif isinstance(command, Note) and (found := PREEMPT.fullmatch(command.what)):
            request = self._by_number.get(int(found[1]))
            if request is not None:
                request.enter(Phase.PREEMPTED, at_s)
                self._waiting.append(request)
            return request
        return None

    def _begin(self, sequence: int, at_s: float) -> RequestTimes:
        request = min(self._waiting, key=lambda one: (one.request.priority, one.arrival))
        self._waiting.remove(request)
        request.enter(Phase.PREFILL, at_s)
        request.sequence = sequence
        self._by_sequence[sequence] = request
        return request

    def _tell(self, request: RequestTimes, command: Emit | Finish | Idle, at_s: float) -> RequestTimes | None:
        if isinstance(command, Idle):
            request.stats = command.stats
            return None
        if isinstance(command, Emit):
            request.enter(Phase.DECODING, at_s)
            request.emitted.append((at_s, len(command.tokens)))
            request.text += command.tokens
            return request
        request.reason = command.reason
        request.enter(None, at_s)
        if request in self._waiting:
            self._waiting.remove(request)
        return request

    def end(self, at_s: float) -> None:
        """The trace has ended: so have the phases under way."""
        for request in self.requests:
            request.enter(None, at_s)

    def watch(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Pass ``steps`` of one trace on, and follow the requests. Times are seconds from the first step."""
        began_s: float | None = None
        at_s = 0.0
        for step in steps:
            began_s = step.now if began_s is None else began_s
            at_s = step.now - began_s
            if step.address == ORCHESTRATOR:
                self.hear(step.event, at_s)
                for command in step.commands:
                    self.carry_out(command, at_s)
            yield step
        self.end(at_s)
