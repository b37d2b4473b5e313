"""The stage: takes runs in stream order, computes its layers for the living, passes all of them on.

Slot operations are applied for every run, dead or alive, so that all stages keep the same table. A run known to be dead
is not computed: it goes on as a tombstone, a header with its operations. A CANCEL may arrive before the run, while it
waits, between two of its layers, or never. It may name single rows; they leave their run at the next stage that takes
it up. A row whose parent was skipped is dead too; a run that loses all its rows becomes a tombstone.

A row whose numbers are not finite stays in its run, so that whoever launched it hears of it. It travels without its
token, which only the first stage needs.

The first stage also paces the orchestrator. Its credit for one more run leaves just in time: as long before the end of
the current run as a credit and the run that answers it were seen to take. The later a run is chosen, the more is known.
"""

from __future__ import annotations

from collections import deque

from kvbuffers.slot_table import SlotTable
from pipeinfer.core.errors import RemoteProtocolError
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
from pipeinfer.core.protocol import (
    FIRST_STAGE,
    NO_SLOT,
    ORCHESTRATOR,
    AnyRow,
    Edges,
    Flag,
    Kind,
    Message,
    ResultRow,
    Row,
    SettingRow,
    address_name,
    fault_token,
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
        self._queue: deque[Received] = deque()
        self._credits_early = credits_early
        self._result_first = result_first
        self._cancelled: dict[int, set[int] | None] = {}  # the dead slots of a run; None: all of them
        self._sampling = GREEDY
        self._current: Message | None = None
        self._abandoned = False
        self._now = 0.0
        self._newest_done = 0  # runs are numbered in stream order
        self._pacer = Pacer()
        self._owes_credit: Message | None = None
        self._measured: tuple[SettingRow, ...] = ()  # what the last run took, the prompt aside

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
            return [self._send(Kind.HELLO, run=self._digest)]
        raise RemoteProtocolError(f"{address_name(self.address)} cannot handle {type(event).__name__}")

    def _receive(self, event: Received) -> list[Command]:
        message = event.message
        self._edges.check(message)
        if message.kind is Kind.RUN:
            self._queue.append(event)
            if self._is_first:
                self._pacer.arrived(self._now)
            if len(self._queue) > self._window:
                raise RemoteProtocolError(f"{len(self._queue)} runs queue at {address_name(self.address)}")
            return self._next()
        if message.kind is Kind.CANCEL:
            return self._cancel(message)
        if message.kind is Kind.REQUEST:
            self._sampling = Sampling.of(message.rows_as(SettingRow))
            return [] if self._is_last else [self._send(Kind.REQUEST, message, rows=message.rows)]
        if message.kind is Kind.SHUTDOWN:
            return [Halt()]
        if message.kind is Kind.PROBE:
            run, flags = (self._current.run, Flag.BUSY) if self._current else (self._newest_done, Flag.NONE)
            taken, waiting = self._edges.taken, len(self._queue)
            status = Message(Kind.STATUS, self.address, ORCHESTRATOR, flags, txn=taken, run=run, epoch=waiting)
            return [Send(status)]
        raise RemoteProtocolError(f"{address_name(self.address)} got {message.kind.name}")

    def _cancel(self, message: Message) -> list[Command]:
        is_news = False
        for row in message.rows_as(Row):
            if row.slot > self._newest_done:
                is_news |= self._mark(row.slot, row.parent)
        commands: list[Command] = []
        if is_news and Flag.RELAY in message.flags and not self._is_first:  # a word that repeats must not multiply
            commands.append(Send(message._replace(source=self.address, dest=self.address - 1)))
        current = self._current
        if current and self._cancelled.get(current.run, ()) is None and not self._abandoned:
            self._abandoned = True
            commands.append(Abandon(current.run))
        return commands

    def _mark(self, run: int, slot: int) -> bool:
        """Note that ``slot`` of ``run`` is dead, or all of it; whether that is news."""
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
            event = self._queue.popleft()
            message = event.message
            self._table.apply(message.ops)
            if self._is_first:
                self._owes_credit = message
            cancelled = self._cancelled.get(message.run, set())
            dead = Flag.TOMBSTONE in message.flags or cancelled is None
            alive = () if dead else self._table.living(message.rows_as(Row), cancelled or ())
            if alive:
                commands.append(self._compute(message, alive, event.payload))
                due = self._pacer.begin(self._now, len(alive))
                if self._is_first and self._credits_early:
                    commands += self._credit() if due is None else [Wake(due)]
            else:
                commands += [*self._credit(), self._entomb(message)]
        return commands

    def _credit(self) -> list[Command]:
        """The credit for the run being computed, if it has not been given."""
        message, self._owes_credit = self._owes_credit, None
        if message is None:
            return []
        self._pacer.credited(self._now)
        return [self._send(Kind.CREDIT, message, rows=self._measured)]

    def _compute(self, message: Message, alive: tuple[int, ...], payload: Payload | None) -> Compute:
        keep = None
        if len(alive) < len(message.rows):
            message, keep = message._replace(rows=tuple(message.rows[index] for index in alive)), alive
        self._current = message
        batch = self._table.allocate(message.rows_as(Row), canonical=Flag.CANONICAL in message.flags)
        wanted = _wanted(message) if self._is_last else ()
        if not wanted:
            return Compute(message.run, batch, payload, keep, choices=int(self._is_last))
        draw = self._table.draw(self._sampling, batch, wanted)
        return Compute(message.run, batch, payload, keep, wanted, choices=1, draw=draw)

    def _computed(self, event: Computed) -> list[Command]:
        message, self._current, self._abandoned = self._current, None, False
        if message is None or event.job != message.run:
            raise RemoteProtocolError(f"{address_name(self.address)} computed {event.job} unasked")
        commands = [] if self._result_first else self._credit()
        is_abandoned = event.hidden is None and event.choices is None
        self._pacer.end(event.seconds, is_abandoned)
        spent_us = min(MOST_US, max(0, round(1e6 * event.seconds)))
        if self._is_first and not is_abandoned and Flag.CANONICAL not in message.flags:
            self._measured = (SettingRow(0, len(message.rows), spent_us, 0.0),)
        message = message._replace(
            rows=_marked(message, event),
            work_us=min(MOST_US, message.work_us + spent_us),
            slowest_us=max(message.slowest_us, spent_us),
        )
        if is_abandoned:
            commands.append(self._entomb(message))
        elif self._is_last:
            self._done(message)
            commands.append(self._send(Kind.RESULT, message, rows=_result_rows(message, event)))
        else:
            self._done(message)
            commands.append(self._pass_on(message, event.hidden))
        return [*commands, *self._credit(), *self._next()]

    def _pass_on(self, message: Message, hidden: Payload) -> Send:
        return self._send(Kind.RUN, message, flags=message.flags, ops=True, rows=message.rows, payload=hidden)

    def _entomb(self, message: Message) -> Send:
        self._done(message)
        if self._is_last:
            return self._send(Kind.RESULT, message, flags=Flag.TOMBSTONE)
        return self._send(Kind.RUN, message, flags=Flag.TOMBSTONE, ops=True)

    def _done(self, message: Message) -> None:
        self._newest_done = message.run
        if self._cancelled:
            self._cancelled = {run: slots for run, slots in self._cancelled.items() if run > message.run}

    def _send(
        self,
        kind: Kind,
        about: Message | None = None,
        flags: Flag = Flag.NONE,
        ops: bool = False,
        rows: tuple[AnyRow, ...] = (),
        payload: Payload | None = None,
        run: int = 0,
    ) -> Send:
        dest = self.address + 1 if kind in (Kind.RUN, Kind.REQUEST) else ORCHESTRATOR
        message = Message(
            kind,
            self.address,
            dest,
            flags,
            request=about.request if about else 0,
            epoch=about.epoch if about else 0,
            txn=self._edges.stamp(dest),
            run=about.run if about else run,
            ops=about.ops if about and ops else (),
            rows=rows,
            work_us=about.work_us if about else 0,
            slowest_us=about.slowest_us if about else 0,
        )
        return Send(message, payload)


def _wanted(message: Message) -> tuple[int, ...]:
    if Flag.SILENT in message.flags:
        return ()
    if Flag.LAST in message.flags:
        return (len(message.rows) - 1,)
    return tuple(range(len(message.rows)))


def _result_rows(message: Message, event: Computed) -> tuple[ResultRow, ...]:
    """The choices that are wanted, and every row whose numbers were not finite."""
    chosen = dict(zip(_wanted(message), event.choices or (), strict=True))
    found = []
    for index, row in enumerate(message.rows_as(Row)):
        if row.token < 0:
            found.append(ResultRow(row.token, row.slot, row.position, 0.0))
        elif index in chosen:
            token, logp = chosen[index][0]
            found.append(ResultRow(token, row.slot, row.position, logp))
    return tuple(found)


def _marked(message: Message, event: Computed) -> tuple[AnyRow, ...]:
    """The rows, those that the pass found faulty without their tokens; what an earlier stage found stays."""
    if not event.faults:
        return message.rows
    rows = enumerate(message.rows_as(Row))
    faults = {index: fault_token(layer) for index, layer in event.faults.items()}
    return tuple(row if row.token < 0 else row._replace(token=faults.get(index, row.token)) for index, row in rows)
