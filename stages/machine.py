"""The stage: takes runs in stream order, computes its layers for the living, passes all of them on.

Cell operations are applied for every run, dead or alive, so that all stages keep the same table. A run known to be dead
is not computed: it goes on as a tombstone, a header with its operations. News of death (CANCEL) may come before the
run, while it waits, between two of its layers, or never. A row whose parent was skipped is dead too and leaves its run
here; a run that loses all its rows becomes a tombstone.

The first stage also paces the orchestrator. Its credit for one more run leaves just in time: as long before the end of
the current run as a credit and the run that answers it were seen to take. The later a run is chosen, the more is known.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from kvbuffers.cells import CellTable
from pipeinfer.errors import RemoteProtocolError
from pipeinfer.ports import (
    Abandon,
    Command,
    Compute,
    Computed,
    Event,
    Halt,
    Payload,
    Received,
    Send,
    Started,
    Wake,
    Woke,
)
from pipeinfer.protocol import (
    FIRST_STAGE,
    ORCHESTRATOR,
    AnyRow,
    ChoiceRow,
    Edges,
    Flag,
    Kind,
    Message,
    Row,
    address_name,
)
from stages.pacer import Pacer


class Stage:
    """The machine of stage ``address`` of ``stages``; ``capacity`` cells, at most ``window`` runs in flight."""

    def __init__(self, address: int, stages: int, capacity: int, window: int, digest: int = 0) -> None:
        self.address = address
        self._is_first = address == FIRST_STAGE
        self._is_last = address == FIRST_STAGE + stages - 1
        self._window = window
        self._digest = digest
        self._edges = Edges(address)
        self._cells = CellTable(capacity)
        self._queue: deque[Received] = deque()
        self._cancelled: set[int] = set()
        self._current: Message | None = None
        self._abandoned = False
        self._now = 0.0
        self._newest_done = 0  # runs are numbered in stream order
        self._pacer = Pacer()
        self._owes_credit: Message | None = None

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
        if message.kind is Kind.SHUTDOWN:
            return [Halt()]
        if message.kind is Kind.PROBE:
            run = self._current.run if self._current else self._newest_done
            return [
                Send(
                    Message(
                        Kind.STATUS, self.address, ORCHESTRATOR, txn=self._edges.taken, run=run, epoch=len(self._queue)
                    )
                )
            ]
        raise RemoteProtocolError(f"{address_name(self.address)} got {message.kind.name}")

    def _cancel(self, message: Message) -> list[Command]:
        news = {row.slot for row in message.rows_as(Row) if row.slot > self._newest_done} - self._cancelled
        self._cancelled |= news
        commands: list[Command] = []
        if news and message.flags & Flag.RELAY and not self._is_first:  # a word that repeats must not multiply
            commands.append(Send(replace(message, source=self.address, dest=self.address - 1)))
        if self._current and self._current.run in self._cancelled and not self._abandoned:
            self._abandoned = True
            commands.append(Abandon(self._current.run))
        return commands

    def _next(self) -> list[Command]:
        """Take runs from the queue up to and including the first that must be computed."""
        commands: list[Command] = []
        while self._queue and self._current is None:
            event = self._queue.popleft()
            message = event.message
            self._cells.apply(message.ops)
            if self._is_first:
                self._owes_credit = message
            dead = message.flags & Flag.TOMBSTONE or message.run in self._cancelled
            alive = () if dead else self._cells.living(message.rows_as(Row))
            if alive:
                commands.append(self._compute(message, alive, event.payload))
                due = self._pacer.begin(self._now, len(alive))
                commands += [Wake(due)] if self._is_first and due is not None else self._credit()
            else:
                commands += [*self._credit(), self._entomb(message)]
        return commands

    def _credit(self) -> list[Command]:
        """The credit for the run being computed, if it has not been given."""
        message, self._owes_credit = self._owes_credit, None
        if message is None:
            return []
        self._pacer.credited(self._now)
        return [self._send(Kind.CREDIT, message)]

    def _compute(self, message: Message, alive: tuple[int, ...], payload: Payload | None) -> Compute:
        keep = None
        if len(alive) < len(message.rows):
            message, keep = replace(message, rows=tuple(message.rows[index] for index in alive)), alive
        self._current = message
        batch = self._cells.admit(message.rows_as(Row), canonical=bool(message.flags & Flag.CANONICAL))
        if not self._is_last:
            return Compute(message.run, batch, payload, keep)
        return Compute(message.run, batch, payload, keep, _wanted(message), choices=1)

    def _computed(self, event: Computed) -> list[Command]:
        message, self._current, self._abandoned = self._current, None, False
        if message is None or event.job != message.run:
            raise RemoteProtocolError(f"{address_name(self.address)} computed {event.job} unasked")
        credit = self._credit()
        is_abandoned = event.hidden is None and event.choices is None
        self._pacer.end(self._now, is_abandoned)
        if is_abandoned:
            command = self._entomb(message)
        elif self._is_last:
            self._done(message)
            command = self._send(Kind.RESULT, message, rows=_choice_rows(message, event))
        else:
            self._done(message)
            command = self._pass_on(message, event.hidden)
        return [*credit, command, *self._next()]

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
            self._cancelled = {run for run in self._cancelled if run > message.run}

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
        dest = self.address + 1 if kind is Kind.RUN else ORCHESTRATOR
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
        )
        return Send(message, payload)


def _wanted(message: Message) -> tuple[int, ...]:
    if message.flags & Flag.SILENT:
        return ()
    if message.flags & Flag.LAST:
        return (len(message.rows) - 1,)
    return tuple(range(len(message.rows)))


def _choice_rows(message: Message, event: Computed) -> tuple[ChoiceRow, ...]:
    rows = message.rows_as(Row)
    return tuple(
        ChoiceRow(choices[0][0], rows[index].slot, rows[index].position, choices[0][1])
        for index, choices in zip(_wanted(message), event.choices or (), strict=True)
    )
