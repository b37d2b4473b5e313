"""The timeline of a job, out of its traces: what was computed when and what came of it, and every message's way.

A stage's pass is worth what its rows are worth (worth.py), and they may be of several requests (request_times.py). The
orchestrator's trace knows both.
"""

from __future__ import annotations

import enum
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeinfer.core.addresses import FIRST_DRAFTER, ORCHESTRATOR
from pipeinfer.core.errors import refuse
from pipeinfer.core.messages import Cancel, Credit, Message, Result, Run
from pipeinfer.core.ports import Command, Compute, Computed, Emit, Event, Halt, Received, Send
from pipeinfer.runtime.request_times import RequestReader, RequestTimes
from pipeinfer.runtime.trace import Header, Trace, in_order
from pipeinfer.runtime.worth import Worth


class Outcome(enum.StrEnum):
    """What came of a pass."""

    PREFILL = "prefill"
    ACCEPTED = "accepted"  # every row's token stands in the answer
    PARTLY = "partly accepted"
    WASTED = "wasted"  # computed to the end, and for nothing
    CANCELLED = "cancelled"  # given up between two layers
    DRAFT = "draft pass"
    UNFINISHED = "unfinished"  # the trace ends before it did


class Share(NamedTuple):
    """The part of a pass that is of ``request`` (the caller's number): its rows, and those that were accepted."""

    request: int
    rows: int
    accepted: int


@dataclass(frozen=True, slots=True)
class Span:
    """One pass through the shard of the role at ``address``, of a stage's run or a drafter's pass ``number``.

    Seconds from the first event of the job. ``accepted``: rows of it whose tokens stand in the answer. ``sequences``:
    how many have rows in it. ``shares``: of a stage's pass, what is whose, in the order of the rows."""

    address: int
    number: int
    began_s: float
    ended_s: float
    rows: int
    accepted: int
    outcome: Outcome
    sequences: int = 1
    shares: tuple[Share, ...] = ()


@dataclass(frozen=True, slots=True)
class Word:
    """A message's way; ``heard_s`` is None where nobody heard it."""

    message: Message
    sent_s: float
    heard_s: float | None

    @property
    def is_tombstone(self) -> bool:
        """Whether its run has been skipped."""
        return isinstance(self.message.body, Run | Result) and self.message.body.is_tombstone

    @property
    def runs(self) -> tuple[int, ...]:
        """The runs that it is about."""
        body = self.message.body
        if isinstance(body, Cancel):
            return tuple(dict.fromkeys(dead.run for dead in body.rows))
        return (body.run,) if isinstance(body, Run | Result | Credit) else ()


@dataclass(frozen=True, slots=True)
class Timeline:
    """What the ``traces`` of a job tell.

    ``ranks``: of each role, by address. ``emitted``: when so many tokens became final. ``in_flight``: from when on so
    many runs were on their way. ``requests``: in the order of submission. ``began_at``: seconds of the Unix epoch (of
    no meaning for a simulated job)."""

    header: Header
    ranks: dict[int, int]
    hosts: dict[int, str]
    spans: list[Span] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    emitted: list[tuple[float, int]] = field(default_factory=list)
    in_flight: list[tuple[float, int]] = field(default_factory=list)
    requests: list[RequestTimes] = field(default_factory=list)
    began_at: float = 0.0
    ended_s: float = 0.0

    @property
    def execution(self) -> str:
        """``real``, or ``simulated`` where no job was configured."""
        return "real" if self.header.config else "simulated"

    @property
    def policy(self) -> str:
        """Its name."""
        return str(self.header.job_spec.get("policy", {}).get("name"))


def read_timeline(traces: Sequence[Trace]) -> Timeline:
    """The timeline of one job. Raises UserError where the orchestrator's trace is not among ``traces``."""
    head = next((trace.header for trace in traces if ORCHESTRATOR in trace.header.roles), None)
    if head is None:
        refuse(f"{traces[0].path} does not tell what was accepted", "give the trace of the rank that led the job, too")
    ranks = {role: trace.header.rank for trace in traces for role in trace.header.roles}
    reader = _Reader()
    began_at = None
    ended_s = 0.0
    for ended_s, step in in_order(traces):
        began_at = traces[0].header.wall_s + step.now if began_at is None else began_at
        reader.hear(step.address, step.event, ended_s)
        for command in step.commands:
            reader.carry_out(step.address, command, ended_s)
    return Timeline(
        head,
        dict(sorted(ranks.items())),
        {trace.header.rank: trace.header.host for trace in traces},
        reader.spans(ended_s),
        reader.words(),
        reader.emitted,
        reader.in_flight,
        reader.requests(ended_s),
        began_at or 0.0,
        ended_s,
    )


@dataclass(slots=True)
class _Pass:
    """A computation, as its trace tells it."""

    address: int
    compute: Compute
    began_s: float
    ended_s: float | None = None
    is_whole: bool = False


class _Reader:
    """Takes the steps of a job in the order of time, and keeps what belongs together until all is known.

    Clocks of two hosts may differ by more than a message takes, so what was heard is joined to what was sent last."""

    def __init__(self) -> None:
        self.emitted: list[tuple[float, int]] = []
        self.in_flight: list[tuple[float, int]] = []
        self._requests = RequestReader()
        self._worth = Worth()
        self._passes: list[_Pass] = []
        self._open: dict[int, _Pass] = {}
        self._sent: list[tuple[Message, float]] = []
        self._heard: defaultdict[tuple[object, ...], deque[tuple[Message, float]]] = defaultdict(deque)

    def hear(self, address: int, event: Event, at_s: float) -> None:
        """The role at ``address`` was told ``event``."""
        if isinstance(event, Received):
            message = event.message
            self._heard[_identity(message)].append((message, at_s))
            if isinstance(message.body, Result):
                self._count(-1, at_s)
        elif isinstance(event, Computed):
            self._close(address, at_s, event.hidden is not None or event.choices is not None)
        else:
            self._requests.hear(event, at_s)

    def carry_out(self, address: int, command: Command, at_s: float) -> None:
        """It commanded ``command``."""
        if address == ORCHESTRATOR and (request := self._requests.carry_out(command, at_s)) is not None:
            self._follow(request, command)
        if isinstance(command, Send):
            message = command.message
            self._sent.append((message, at_s))
            if isinstance(message.body, Run) and address == ORCHESTRATOR:
                self._worth.launch(message.body)
                self._count(1, at_s)
        elif isinstance(command, Compute):
            self._open[address] = _Pass(address, command, at_s)
            self._passes.append(self._open[address])
        elif isinstance(command, Emit):
            self.emitted.append((at_s, len(command.tokens)))
        elif isinstance(command, Halt):
            self._close(address, at_s, is_whole=False)

    def _follow(self, request: RequestTimes, command: Command) -> None:
        """A sequence of ``request`` begins, has tokens or ends."""
        if isinstance(command, Send):
            self._worth.begin(request.sequence, [*request.request.prompt, *request.text])
        elif isinstance(command, Emit):
            self._worth.emit(request.sequence, command.tokens)
        else:
            self._worth.settle(request.sequence)

    def requests(self, ended_s: float) -> list[RequestTimes]:
        """Every request; the trace has ended at ``ended_s``."""
        self._requests.end(ended_s)
        return self._requests.requests

    def _close(self, address: int, at_s: float, is_whole: bool) -> None:
        if (done := self._open.pop(address, None)) is not None:
            done.ended_s, done.is_whole = at_s, is_whole

    def _count(self, change: int, at_s: float) -> None:
        self.in_flight.append((at_s, (self.in_flight[-1][1] if self.in_flight else 0) + change))

    def words(self) -> list[Word]:
        """Every message, in the order of sending; the receiver's is the one that tells its size."""
        words = []
        for message, sent_s in self._sent:
            heard = self._heard[_identity(message)]
            taken, heard_s = heard.popleft() if heard else (message, None)
            words.append(Word(taken, sent_s, heard_s))
        return words

    def spans(self, ended_s: float) -> list[Span]:
        """Every computation, in the order of beginning; the trace has ended at ``ended_s``."""
        self._worth.settle_all()
        return [self._span(one, ended_s) for one in self._passes]

    def _span(self, one: _Pass, ended_s: float) -> Span:
        run, slots = one.compute.job, one.compute.batch.slots.tolist()
        is_draft = one.address >= FIRST_DRAFTER
        shares = () if is_draft else self._shares(run, slots)
        accepted = sum(share.accepted for share in shares)
        if one.ended_s is None:
            outcome = Outcome.UNFINISHED
        elif not one.is_whole:
            outcome = Outcome.CANCELLED
        elif is_draft:
            outcome = Outcome.DRAFT
        elif run in self._worth.prefills:
            outcome = Outcome.PREFILL
        elif accepted == len(slots):
            outcome = Outcome.ACCEPTED
        else:
            outcome = Outcome.PARTLY if accepted else Outcome.WASTED
        until_s = ended_s if one.ended_s is None else one.ended_s
        many = len(one.compute.batch.canonical)
        return Span(one.address, run, one.began_s, until_s, len(slots), accepted, outcome, many, shares)

    def _shares(self, run: int, slots: list[int]) -> tuple[Share, ...]:
        """Whose the rows of ``run`` in ``slots`` are."""
        found: dict[int, list[bool]] = {}
        for slot in slots:
            number = self._requests.number_of(self._worth.owners.get((run, slot), 0))
            if number is not None:
                found.setdefault(number, []).append((run, slot) in self._worth.accepted)
        return tuple(Share(number, len(rows), sum(rows)) for number, rows in found.items())


def _identity(message: Message) -> tuple[object, ...]:
    """What the two ends of a message's way have in common, and no other message. Advice is not numbered; of equal ones
    the first that was sent is the first that was heard."""
    if message.is_control:
        return message.source, message.dest, message.kind, message.body
    return message.source, message.dest, message.txn
