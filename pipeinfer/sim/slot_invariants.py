"""L3: allocators and tables against a shadow kept from the messages. Peeks into private attributes, as it must."""

from __future__ import annotations

from kvbuffers.slot_allocator import SlotAllocator
from kvbuffers.slot_table import SlotTable
from pipeinfer.core.ports import Command, Compute, Event, Machine, Request, Send
from pipeinfer.core.protocol import (
    ORCHESTRATOR,
    Flag,
    Kind,
    Row,
    SlotOp,
    SlotOpKind,
    address_name,
)
from pipeinfer.sim.history import History, InvariantBroken, Launched, Reader, Written
from pipeinfer.sim.world import Answer, World
from speculation.drafter.machine import Drafter
from stages.stage.machine import Stage

STRIDE = 16
"""Tables are compared as a whole at every so many events of a role, and when a request is idle."""


class Slots(Reader):
    """L3 for the stream that leaves the orchestrator: its allocator against a shadow kept from the messages."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._canonical: list[int] = []  # slots by position
        self._leased: dict[int, Written] = {}
        self._count = 0

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address != ORCHESTRATOR:
            return
        for command in commands:
            if isinstance(command, Send) and command.message.kind is Kind.RUN:
                self._replay(self.history.runs[command.message.run])
        self._count += 1
        if self._count % STRIDE == 0:
            self._compare(world)

    def on_idle(self, world: World, answer: Answer, request: Request) -> None:
        """See Checker."""
        self._compare(world)

    def _replay(self, run: Launched) -> None:
        for op in run.message.ops:
            if op.kind is SlotOpKind.CLEAR:
                self._canonical, self._leased = [], {}
            for index in range(op.length):
                self._apply(op, op.slot + index, op.position + index, run.message.run)
        for row in run.message.rows_as(Row):
            if row.slot in self._leased or row.slot in self._canonical:
                raise InvariantBroken(f"L3: run {run.message.run} writes to slot {row.slot}, which is in use")
            if run.message.flags & Flag.CANONICAL:
                self._accept(row.slot, run.written[row.slot], row.position, run.message.run)
            else:
                self._leased[row.slot] = run.written[row.slot]
        run.canonical, run.leased = len(self._canonical), frozenset(self._leased)

    def _apply(self, op: SlotOp, slot: int, position: int, number: int) -> None:
        written = self._leased.pop(slot, None)
        if written is None:
            raise InvariantBroken(f"L3: run {number} carries {op.kind.name} of slot {slot}, which is not leased")
        if op.kind is SlotOpKind.COMMIT:
            self._accept(slot, written, position, number)
        elif not written.is_copy and not self.history.is_useless(written):
            raise InvariantBroken(
                f"L3: run {number} releases slot {slot}, whose token {written.token} may still be accepted"
            )

    def _accept(self, slot: int, written: Written, position: int, number: int) -> None:
        place, text = len(self._canonical), self.history.text
        if position != place or written.position != place or place >= len(text) or written.token != text[place]:
            what = f"slot {slot} (token {written.token}, position {written.position}) at position {position}"
            raise InvariantBroken(
                f"L3: run {number} commits {what}; the next one is {text[place : place + 1]} at {place}"
            )
        self._canonical.append(slot)

    def _compare(self, world: World) -> None:
        allocator = world.orchestrator._allocator
        _check("orchestrator's allocator", allocator)
        if allocator._ops and allocator._ops[0].kind is SlotOpKind.CLEAR:
            return  # of the next request
        if not (allocator._leased <= self._leased.keys() and allocator._canonical >= set(self._canonical)):
            raise InvariantBroken("L3: the orchestrator's allocator contradicts the operations that it sent")
        for slot in allocator._leased if not self.history.over else ():
            if self.history.is_dead(self._leased[slot]):
                raise InvariantBroken(f"L3: slot {slot} is kept for token {self._leased[slot].token}, which is dead")


class Replicas(Reader):
    """L3 for those who follow a stream: every stage's table, and the drafter's table and allocator."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._applied: dict[int, int] = {}  # the last run whose operations a stage has applied
        self._slots: dict[tuple[int, int], int] = {}  # what a drafter wrote where
        self._count = 0

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address == ORCHESTRATOR:
            return
        for command in commands:
            if isinstance(command, Compute) and address > world.spec.stages:
                batch = command.batch
                for slot, token in zip(batch.slots.tolist(), batch.tokens.tolist(), strict=True):
                    self._slots[address, slot] = token
            elif isinstance(command, Compute):
                self._applied[address] = command.job
            elif isinstance(command, Send) and command.message.kind in (Kind.RUN, Kind.RESULT):
                self._applied[address] = command.message.run
        self._count += 1
        if self._count % STRIDE == 0:
            self._compare(world.machine(address))

    def on_idle(self, world: World, answer: Answer, request: Request) -> None:
        """See Checker."""
        for machine in world.machines[1:]:
            self._compare(machine)

    def _compare(self, machine: Machine) -> None:
        if isinstance(machine, Stage):
            self._compare_stage(machine)
        elif isinstance(machine, Drafter):
            self._compare_drafter(machine)

    def _compare_stage(self, stage: Stage) -> None:
        name, table = address_name(stage.address), stage._table
        run = self.history.runs.get(self._applied.get(stage.address, 0))
        _check(f"table of {name}", table)
        if run is None:
            return  # it has not heard of this request yet
        tokens = [self.history._at[slot].token for slot in table._canonical]
        wanted = self.history.text[: run.canonical]
        if self.history.over and not self.history.has_begun:
            wanted = wanted[: len(tokens)]  # aborted during its prompt: the rest of it was skipped, and rightly so
        if tokens != wanted:
            raise InvariantBroken(f"L3: after run {run.message.run} {name} holds {tokens}, not {wanted}")
        if not table._leased.keys() <= run.leased:
            extra = sorted(table._leased.keys() - run.leased)
            raise InvariantBroken(f"L3: after run {run.message.run} {name} still keeps the released slots {extra}")

    def _compare_drafter(self, drafter: Drafter) -> None:
        _check("drafter's allocator", drafter._allocator)
        _check("drafter's table", drafter._table)
        if drafter._request == self.history.requests and drafter._prefilled:
            tokens = [self._slots[drafter.address, slot] for slot in drafter._table._canonical]
            if tokens != self.history.text[: len(tokens)]:
                raise InvariantBroken(f"L3: the drafter holds {tokens}, accepted are {self.history.text}")


def _check(name: str, table: SlotTable | SlotAllocator) -> None:
    try:
        table.check()
    except AssertionError as error:
        raise InvariantBroken(f"L3: {name}: {error}") from error
    if sum(table.counts()) != table.capacity:
        raise InvariantBroken(f"L3: {name}: free, leased and canonical slots are {table.counts()} of {table.capacity}")
