"""L3: allocators and tables against a shadow kept from the messages. Peeks into private attributes, as it must."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvbuffers.slot_allocator import SlotAllocator
from kvbuffers.slot_table import SlotTable
from pipeinfer.core.addresses import ORCHESTRATOR, address_name
from pipeinfer.core.messages import Result, Run, SlotOp, SlotOpKind
from pipeinfer.core.ports import Command, Compute, Event, Machine, Request, Send
from pipeinfer.sim.history import History, InvariantBroken, Launched, Reader, SequenceRecord, Written
from pipeinfer.sim.world import Answer, World
from speculation.drafter.machine import Drafter
from stages.stage.machine import Stage

STRIDE = 16
"""Tables are compared as a whole at every so many events of a role, and when a request is idle."""


@dataclass(slots=True)
class _Shadow:
    """The slots of one sequence: the canonical ones by position, and what the leased ones hold."""

    canonical: list[int] = field(default_factory=list)
    leased: dict[int, Written] = field(default_factory=dict)


class Slots(Reader):
    """L3 for the stream that leaves the orchestrator: its allocator against a shadow kept from the messages."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._shadows: dict[int, _Shadow] = {}  # by sequence
        self._count = 0

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address != ORCHESTRATOR:
            return
        for command in commands:
            if isinstance(command, Send) and isinstance(command.message.body, Run):
                launched = self.history.runs.get(command.message.body.run)
                if launched is not None:  # else its sequence ended in the same step
                    self._replay(launched)
        self._count += 1
        if self._count % STRIDE == 0:
            self._compare(world)

    def on_idle(self, world: World, answer: Answer, request: Request) -> None:
        """See Checker."""
        self._compare(world)

    def _replay(self, launched: Launched) -> None:
        run, record = launched.run, launched.record
        for op in run.ops:
            if op.kind is SlotOpKind.FREE:
                if op.sequence not in self._shadows or op.sequence == record.sequence:
                    raise InvariantBroken(f"L3: run {run.run} frees sequence {op.sequence}, wrongly")
                del self._shadows[op.sequence]
            for index in range(op.length):
                self._apply(op, op.slot + index, op.position + index, run.run)
        shadow = self._shadows.setdefault(record.sequence, _Shadow())
        used = {slot for one in self._shadows.values() for slot in (*one.leased, *one.canonical)}
        for row in run.rows:
            if row.slot in used:
                raise InvariantBroken(f"L3: run {run.run} writes to slot {row.slot}, which is in use")
            used.add(row.slot)
            if run.is_canonical:
                self._accept(record, shadow, row.slot, launched.written[row.slot], row.position, run.run)
            else:
                shadow.leased[row.slot] = launched.written[row.slot]
        launched.canonical, launched.leased = len(shadow.canonical), frozenset(shadow.leased)

    def _apply(self, op: SlotOp, slot: int, position: int, number: int) -> None:
        record, shadow = self.history.sequences.get(op.sequence), self._shadows.get(op.sequence)
        written = shadow.leased.pop(slot, None) if shadow else None
        if written is None or record is None or shadow is None:
            raise InvariantBroken(f"L3: run {number} carries {op.kind.name} of slot {slot}, which is not leased")
        if op.kind is SlotOpKind.COMMIT:
            self._accept(record, shadow, slot, written, position, number)
        elif not written.is_copy and not self.history.is_useless(record, written):
            raise InvariantBroken(
                f"L3: run {number} releases slot {slot}, whose token {written.token} may still be accepted"
            )

    @staticmethod
    def _accept(
        record: SequenceRecord, shadow: _Shadow, slot: int, written: Written, position: int, number: int
    ) -> None:
        place, text = len(shadow.canonical), record.text
        if position != place or written.position != place or place >= len(text) or written.token != text[place]:
            what = f"slot {slot} (token {written.token}, position {written.position}) at position {position}"
            raise InvariantBroken(
                f"L3: run {number} commits {what}; the next one is {text[place : place + 1]} at {place}"
            )
        shadow.canonical.append(slot)

    def _compare(self, world: World) -> None:
        allocator = world.orchestrator._allocator
        _check("orchestrator's allocator", allocator)
        for sequence, canonical in allocator._canonical.items():
            shadow, record = self._shadows.get(sequence, _Shadow()), self.history.sequences.get(sequence)
            leased = {slot for slot, owner in allocator._leased.items() if owner == sequence}
            if not (leased <= shadow.leased.keys() and canonical[: len(shadow.canonical)] == shadow.canonical):
                raise InvariantBroken("L3: the orchestrator's allocator contradicts the operations that it sent")
            for slot in leased if record and not record.over else ():
                if record and record.is_dead(shadow.leased[slot]):
                    token = shadow.leased[slot].token
                    raise InvariantBroken(f"L3: slot {slot} is kept for token {token}, which is dead")


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
            elif isinstance(command, Send) and isinstance(command.message.body, Run | Result):
                self._applied[address] = command.message.body.run
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
        launched = self.history.runs.get(self._applied.get(stage.address, 0))
        _check(f"table of {name}", table)
        if launched is None:
            return  # it has received nothing of this request yet
        record, number = launched.record, launched.run.run
        state = table._sequences.get(record.sequence)
        canonical, leased = (state.canonical, state.leased.keys()) if state else ((), set[int]())
        tokens = [record.at[slot].token for slot in canonical]
        wanted = record.text[: launched.canonical]
        if record.over and not record.has_begun:
            wanted = wanted[: len(tokens)]  # aborted during its prompt: the rest of it was skipped, and rightly so
        if tokens != wanted:
            raise InvariantBroken(f"L3: after run {number} {name} holds {tokens}, not {wanted}")
        if not leased <= launched.leased:
            extra = sorted(leased - launched.leased)
            raise InvariantBroken(f"L3: after run {number} {name} still keeps the released slots {extra}")

    def _compare_drafter(self, drafter: Drafter) -> None:
        _check("drafter's allocator", drafter._allocator)
        _check("drafter's table", drafter._table)
        for sequence, state in drafter._table._sequences.items():
            record = self.history.sequences.get(sequence)
            if record is not None and sequence in drafter._sequences:
                tokens = [self._slots[drafter.address, slot] for slot in state.canonical]
                if tokens != record.text[: len(tokens)]:
                    raise InvariantBroken(f"L3: the drafter holds {tokens}, accepted are {record.text}")


def _check(name: str, table: SlotTable | SlotAllocator) -> None:
    try:
        table.check()
    except AssertionError as error:
        raise InvariantBroken(f"L3: {name}: {error}") from error
    if sum(table.counts()) != table.capacity:
        raise InvariantBroken(f"L3: {name}: free, leased and canonical slots are {table.counts()} of {table.capacity}")
