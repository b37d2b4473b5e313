"""The stage: takes runs in stream order, computes its layers for the living, passes all of them on.

Slot operations are applied for every run, dead or alive, so that all stages keep the same table. A run known to be dead
is not computed: it goes on as a tombstone, a header with its operations. A CANCEL may arrive before the run, while it
waits, between two of its layers, or never. It may name single rows; they leave their run at the next stage that takes
it up. A row whose parent was skipped is dead too; a run that loses all its rows becomes a tombstone.

Slots and sampling settings are kept per sequence; they go with the operation that frees the sequence.

A row whose numbers are not finite stays in its run, so that whoever launched it learns of it. It travels without its
token, which only the first stage needs.

The first stage also paces the orchestrator. Its credit for one more run leaves just in time: as long before the end of
the current run as a credit and the run that answers it were seen to take. The later a run is chosen, the more is known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from kvbuffers.slot_table import SlotTable
from pipeinfer.core.addresses import FIRST_STAGE, ORCHESTRATOR, address_name
from pipeinfer.core.edges import Edges
from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import (
    NO_SLOT,
    NO_TOKEN,
    Body,
    Cancel,
    Credit,
    Hello,
    Message,
    Probe,
    Result,
    ResultRow,
    Row,
    Run,
    Settings,
    Shutdown,
    SlotOp,
    SlotOpKind,
    Status,
    TopToken,
    Wants,
    fault_token,
)
from pipeinfer.core.ports import (
    GREEDY,
    Abandon,
    Command,
    Compute,
    Computed,
    Event,
    Halt,
    Payload,
    Received,
    Sampling,
    Send,
    Started,
    Wake,
    Woke,
)
from stages.stage.pacer import Pacer

MOST_US = 0xFFFFFFFF


class Stage:
    """The machine of stage ``address`` of ``stages``; ``capacity`` slots, at most ``window`` runs in flight.

    ``credits_early``: whether the first stage's credit leaves before the run has ended, just in time for the next.
    ``result_first``: of a stage that is first and last, whether it leaves after the result."""

    def __init__(
        self,
        address: int,
        stages: int,
        capacity: int,
        window: int,
        digest: int = 0,
        credits_early: bool = True,
        result_first: bool = False,
    ) -> None:
        self.address = address
        self._is_first = address == FIRST_STAGE
        self._is_last = address == FIRST_STAGE + stages - 1
        self._window = window
        self._digest = digest
        self._edges = Edges(address)
        self._table = SlotTable(capacity)
        self._queue: deque[tuple[Run, Payload | None]] = deque()
        self._credits_early = credits_early
        self._result_first = result_first
        self._cancelled: dict[int, set[int] | None] = {}  # the dead slots of a run; None: all of them
        self._sampling: dict[int, Sampling] = {}  # by sequence
        self._current: Run | None = None
        self._abandoned = False
        self._now = 0.0
        self._newest_done = 0  # runs are numbered in stream order
        self._pacer = Pacer()
        self._owes_credit: int | None = None  # the run
        self._measured = (0, 0)  # rows of the last run, prompts aside, and the microseconds that it took

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; see Machine."""
        self._now = now
        if isinstance(event, Received):
            return self._receive(event)
        if isinstance(event, Computed):
            return self._computed(event)
        if isinstance(event, Woke):
            self._pacer.woke(now)
            return self._credit()
        if isinstance(event, Started):
            return [self._send(ORCHESTRATOR, Hello(self._digest))]
        raise RemoteProtocolError(f"{address_name(self.address)} cannot handle {type(event).__name__}")

    def _receive(self, event: Received) -> list[Command]:
        self._edges.check(event.message)
        match event.message.body:
            case Run() as run:
                self._queue.append((run, event.payload))
                if self._is_first:
                    self._pacer.arrived(self._now)
                if len(self._queue) > self._window:
                    raise RemoteProtocolError(f"{len(self._queue)} runs queue at {address_name(self.address)}")
                return self._next()
            case Cancel() as cancel:
                return self._cancel(cancel)
            case Settings() as settings:
                self._sampling[settings.sequence] = Sampling.of(settings)
                return [] if self._is_last else [self._send(self.address + 1, settings)]
            case Shutdown():
                return [Halt()]
            case Probe():
                run_number = self._current.run if self._current else self._newest_done
                status = Status(self._current is not None, run_number, len(self._queue), self._edges.taken)
                return [Send(Message(self.address, ORCHESTRATOR, status))]
        raise RemoteProtocolError(f"{address_name(self.address)} got {event.message.kind}")

    def _cancel(self, cancel: Cancel) -> list[Command]:
        is_new = False
        for dead in cancel.rows:
            if dead.run > self._newest_done:
                is_new |= self._mark(dead.run, dead.slot)
        commands: list[Command] = []
        if is_new and cancel.relay and not self._is_first:  # advice that repeats must not multiply
            commands.append(Send(Message(self.address, self.address - 1, cancel)))
        current = self._current
        if current and self._cancelled.get(current.run, ()) is None and not self._abandoned:
            self._abandoned = True
            commands.append(Abandon(current.run))
        return commands

    def _mark(self, run: int, slot: int) -> bool:
        """Note that ``slot`` of ``run`` is dead, or all of it; whether that was unknown."""
        slots = self._cancelled.setdefault(run, set())
        if slots is None or slot in slots:
            return False
        if slot == NO_SLOT:
            self._cancelled[run] = None
        else:
            slots.add(slot)
        return True

    def _next(self) -> list[Command]:
        """Take runs from the queue up to and including the first that must be computed."""
        commands: list[Command] = []
        while self._queue and self._current is None:
            run, payload = self._queue.popleft()
            self._apply(run.ops)
            if self._is_first:
                self._owes_credit = run.run
            cancelled = self._cancelled.get(run.run, set())
            dead = run.is_tombstone or cancelled is None
            alive = () if dead else self._table.living(run.rows, cancelled or ())
            if alive:
                commands.append(self._compute(run, alive, payload))
                due = self._pacer.begin(self._now, len(alive))
                if self._is_first and self._credits_early:
                    commands += self._credit() if due is None else [Wake(due)]
            else:
                commands += [*self._credit(), self._entomb(run)]
        return commands

    def _apply(self, ops: tuple[SlotOp, ...]) -> None:
        self._table.apply(ops)
        for op in ops:
            if op.kind is SlotOpKind.FREE:
                self._sampling.pop(op.sequence, None)

    def _credit(self) -> list[Command]:
        """The credit for the run being computed, if it has not been given."""
        run, self._owes_credit = self._owes_credit, None
        if run is None:
            return []
        self._pacer.credited(self._now)
        return [self._send(ORCHESTRATOR, Credit(run, *self._measured))]

    def _compute(self, run: Run, alive: tuple[int, ...], payload: Payload | None) -> Compute:
        keep = None
        if len(alive) < len(run.rows):
            run, keep = _with_rows(run, alive), alive
        self._current = run
        batch = self._table.allocate(run.rows, canonical=run.is_canonical)
        wanted = _wanted(run) if self._is_last else ()
        if not wanted:
            return Compute(run.run, batch, payload, keep, choices=int(self._is_last))
        samplings = [self._sampling.get(run.rows[index].sequence, GREEDY) for index in wanted]
        given = tuple([run.next_tokens[index] for index in wanted]) if run.next_tokens else ()
        if given:
            pairs = zip(samplings, given, strict=True)
            samplings = [one if token == NO_TOKEN else _beside_given(one) for one, token in pairs]
        draw = self._table.draw(samplings, batch, wanted)
        draw = replace(draw, given=given) if given else draw
        return Compute(run.run, batch, payload, keep, wanted, choices=1, draw=draw)

    def _computed(self, event: Computed) -> list[Command]:
        run, self._current, self._abandoned = self._current, None, False
        if run is None or event.job != run.run:
            raise RemoteProtocolError(f"{address_name(self.address)} computed {event.job} unasked")
        commands = [] if self._result_first else self._credit()
        is_abandoned = event.hidden is None and event.choices is None
        self._pacer.end(event.seconds, is_abandoned)
        spent_us = min(MOST_US, max(0, round(1e6 * event.seconds)))
        if self._is_first and not is_abandoned and not run.is_canonical:
            self._measured = (len(run.rows), spent_us)
        run = run._replace(
            rows=_marked(run, event),
            work_us=min(MOST_US, run.work_us + spent_us),
            slowest_us=max(run.slowest_us, spent_us),
        )
        if is_abandoned:
            commands.append(self._entomb(run))
        elif self._is_last:
            self._done(run)
            commands.append(self._send(ORCHESTRATOR, _result(run, event)))
        else:
            self._done(run)
            commands.append(self._send(self.address + 1, run, event.hidden))
        return [*commands, *self._credit(), *self._next()]

    def _entomb(self, run: Run) -> Send:
        """Pass on a dead run: its operations alone."""
        self._done(run)
        if self._is_last:
            return self._send(ORCHESTRATOR, Result(run.run, True, run.work_us, run.slowest_us))
        return self._send(
            self.address + 1, Run(run.run, False, True, Wants.NOTHING, run.work_us, run.slowest_us, run.ops)
        )

    def _done(self, run: Run) -> None:
        self._newest_done = run.run
        if self._cancelled:
            self._cancelled = {number: slots for number, slots in self._cancelled.items() if number > run.run}

    def _send(self, dest: int, body: Body, payload: Payload | None = None) -> Send:
        return Send(self._edges.message(dest, body), payload)


def _wanted(run: Run) -> tuple[int, ...]:
    """The rows of ``run`` after which a token is wanted, or the log-probability of one. Rows of a sequence are
    neighbours."""
    rows = run.rows
    if run.wants is Wants.EVERY:
        return tuple(range(len(rows)))
    last = len(rows) - 1 if run.wants is Wants.LAST else -1
    wanted = [index for index in range(last) if rows[index].sequence != rows[index + 1].sequence]
    wanted += [last] if last >= 0 else []
    scored = [index for index, token in enumerate(run.next_tokens) if token != NO_TOKEN]
    return tuple(sorted({*wanted, *scored}) if scored else wanted)


def _with_rows(run: Run, kept: Sequence[int]) -> Run:
    """``run`` with the rows ``kept`` alone."""
    next_tokens = tuple([run.next_tokens[index] for index in kept]) if run.next_tokens else ()
    return run._replace(rows=tuple([run.rows[index] for index in kept]), next_tokens=next_tokens)


def _beside_given(sampling: Sampling) -> Sampling:
    """What is wanted beside a token of the prompt of a sequence with ``sampling``: nothing is drawn there."""
    return Sampling(top_logprobs=sampling.prompt_logprobs or 0)


def _result(run: Run, event: Computed) -> Result:
    """The tokens that are wanted, each with the most probable ones that its sequence wants beside it, and every row
    whose numbers were not finite."""
    chosen = dict(zip(_wanted(run), event.choices or (), strict=True))
    found, top = list[ResultRow](), list[TopToken]()
    for index, row in enumerate(run.rows):
        if row.token < 0:
            found.append(ResultRow(row.token, row.slot, row.position, 0.0, row.sequence))
        elif index in chosen:
            (token, logp), *most = chosen[index]
            found.append(ResultRow(token, row.slot, row.position, logp, row.sequence, len(most)))
            top += [TopToken(*each) for each in most]
    return Result(run.run, False, run.work_us, run.slowest_us, tuple(found), tuple(top))


def _marked(run: Run, event: Computed) -> tuple[Row, ...]:
    """The rows, those that the pass found faulty without their tokens; what an earlier stage found stays."""
    if not event.faults:
        return run.rows
    faults = {index: fault_token(layer) for index, layer in event.faults.items()}
    return tuple(
        row if row.token < 0 else row._replace(token=faults.get(index, row.token)) for index, row in enumerate(run.rows)
    )
