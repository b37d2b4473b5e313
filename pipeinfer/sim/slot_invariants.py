"""L3: allocators and tables against a shadow kept from the messages. Peeks into private attributes, as it must."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvbuffers.slot_allocator import SlotAllocator
from kvbuffers.slot_table import SlotTable
from pipeinfer.core.addresses import ORCHESTRATOR, address_name
from pipeinfer.core.messages import Result, Run, SlotOp, SlotOpKind
from pipeinfer.core.ports import Command, Compute, Event, Machine, Request, Send
from pipeinfer.sim.history import Held, History, InvariantBroken, Launched, Reader, SequenceRecord, Written
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
    held: Held | None = None  # made when asked for, void after a change

    def snapshot(self) -> Held:
        """What it holds now."""
        if self.held is None:
            self.held = Held(len(self.canonical), frozenset(self.leased))
        return self.held


class Slots(Reader):
    """L3 for the stream that leaves the orchestrator: its allocator against a shadow kept from the messages. A slot may
    be canonical in several sequences; leased to one, it is in no other."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._shadows: dict[int, _Shadow] = {}  # by sequence, until it is freed
        self._preempted: set[int] = set()  # sequences of requests that are not over, which the next run has to free
        self._owners: Counter[int] = Counter()  # how many sequences have a slot
        self._count = 0

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address != ORCHESTRATOR:
            return
        for command in commands:
            if isinstance(command, Send) and isinstance(command.message.body, Run):
                self._replay(self.history.runs[command.message.body.run])
                if kept := self._preempted & self._shadows.keys():
                    raise InvariantBroken(f"L3: run {command.message.body.run} does not free the sequences {kept}")
        records = self.history.sequences
        self._preempted = {one for one in self._shadows if records[one].dropped and not records[one].over}
        self._count += 1
        if self._count % STRIDE == 0:
            self._compare(world)

    def on_idle(self, world: World, answer: Answer, request: Request) -> None:
        """See Checker: what is over leases nothing, although its canonical slots may be kept for others."""
        self._compare(world)
        for slot, sequence in world.orchestrator._allocator._leased.items():
            record = self.history.sequences.get(sequence)
            if record is None or record.number == answer.number:
                raise InvariantBroken(f"L3: request {answer.number} is idle, slot {slot} is leased to {sequence}")

    def _replay(self, launched: Launched) -> None:
        run = launched.run
        for op in run.ops:
            self._apply(op, run.run)
        for row in run.rows:
            written = launched.written[row.slot]
            if written.record.freed:
                raise InvariantBroken(f"L3: run {run.run} has {row}, whose sequence was freed")
            if self._owners[row.slot]:
                raise InvariantBroken(f"L3: run {run.run} writes to slot {row.slot}, which is in use")
            self._owners[row.slot] = 1
            shadow = self._shadows.setdefault(row.sequence, _Shadow())
            shadow.held = None
            if run.is_canonical:
                self._accept(written.record, shadow, row.slot, written, row.position, run.run)
            else:
                shadow.leased[row.slot] = written
        launched.after = {sequence: shadow.snapshot() for sequence, shadow in self._shadows.items()}

    def _apply(self, op: SlotOp, number: int) -> None:
        if op.kind is SlotOpKind.FREE:
            self._free(op.sequence, number)
        elif op.kind is SlotOpKind.FORK:
            self._fork(op, number)
        elif op.kind is SlotOpKind.TRUNCATE:
            self._truncate(op, number)
        else:
            for index in range(op.length):
                self._commit_or_release(op, op.slot + index, op.position + index, number)

    def _free(self, sequence: int, number: int) -> None:
        """A sequence ends, once; before its request is over only where another one may need its slots."""
        record, shadow = self.history.sequences.get(sequence), self._shadows.pop(sequence, None)
        is_early = record is not None and not record.over and self.history.spec.max_num_seqs == 1
        if shadow is None or is_early:
            raise InvariantBroken(f"L3: run {number} frees sequence {sequence}, wrongly")
        self._give_back(shadow.canonical)
        self._give_back(shadow.leased)

    def _give_back(self, slots: Iterable[int]) -> None:
        self._owners.subtract(list(slots))

    def _fork(self, op: SlotOp, number: int) -> None:
        """``op.length`` tokens are shared; they must be those that the new sequence begins with."""
        record, source = self.history.sequences.get(op.sequence), self.history.sequences.get(op.slot)
        held = self._shadows.get(op.slot)
        if record is None or source is None or held is None or op.sequence in self._shadows:
            raise InvariantBroken(
                f"L3: run {number} carries {op}, of a sequence that is not there, or has slots already"
            )
        slots = held.canonical[: op.length]
        tokens = [source.at[slot].token for slot in slots]
        wanted = list(record.prompt[: op.length])
        if len(slots) < op.length or tokens != wanted:
            raise InvariantBroken(f"L3: run {number} carries {op} of tokens {tokens}, the prompt has {wanted}")
        self._shadows[op.sequence] = _Shadow(slots)
        self._owners.update(slots)

    def _truncate(self, op: SlotOp, number: int) -> None:
        shadow = self._shadows.get(op.sequence)
        if shadow is None or op.length > len(shadow.canonical):
            raise InvariantBroken(f"L3: run {number} carries {op}, which cannot be done")
        self._give_back(shadow.canonical[op.length :])
        self._give_back(shadow.leased)
        del shadow.canonical[op.length :]
        shadow.leased, shadow.held = {}, None

    def _commit_or_release(self, op: SlotOp, slot: int, position: int, number: int) -> None:
        record, shadow = self.history.sequences.get(op.sequence), self._shadows.get(op.sequence)
        written = shadow.leased.pop(slot, None) if shadow else None
        if written is None or record is None or shadow is None:
            raise InvariantBroken(f"L3: run {number} carries {op.kind.name} of slot {slot}, which is not leased")
        shadow.held = None
        if op.kind is SlotOpKind.COMMIT:
            self._accept(record, shadow, slot, written, position, number)
            return
        self._owners[slot] = 0
        if not written.is_copy and not self.history.is_useless(written):
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
            for slot in leased if record and record.is_living else ():
                if record and record.is_dead(shadow.leased[slot]):
                    token = shadow.leased[slot].token
                    raise InvariantBroken(f"L3: slot {slot} is kept for token {token}, which is dead")
        freed = {op.sequence for op in allocator._ops if op.kind is SlotOpKind.FREE}
        if lost := self._shadows.keys() - allocator._canonical.keys() - freed:
            raise InvariantBroken(f"L3: the slots of the sequences {sorted(lost)} are lost: nobody will free them")
        head = world.orchestrator
        served = {session.sequence for session in (*head._sessions.values(), *head._draining)}
        if lost := allocator._canonical.keys() - served - head._pool._kept.keys():
            raise InvariantBroken(f"L3: the slots of the sequences {sorted(lost)} are lost: they end, and are not kept")


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
            return  # the sequences of that run are forgotten
        number = launched.run.run
        if extra := table._sequences.keys() - launched.after.keys():
            raise InvariantBroken(f"L3: after run {number} {name} still keeps the freed sequences {sorted(extra)}")
        for sequence, held in launched.after.items():
            record, state = self.history.sequences.get(sequence), table._sequences.get(sequence)
            canonical, leased = (state.canonical, state.leased.keys()) if state else ((), set[int]())
            if not leased <= held.leased:
                extra = leased - held.leased
                raise InvariantBroken(f"L3: after run {number} {name} still keeps the released slots {sorted(extra)}")
            if record is not None:
                self._compare_text(record, list(canonical), held, f"after run {number} {name}")

    @staticmethod
    def _compare_text(record: SequenceRecord, canonical: list[int], held: Held, who: str) -> None:
        tokens, wanted = [record.at[slot].token for slot in canonical], record.text[: held.canonical]
        if not record.is_living and not record.has_begun:
            wanted = wanted[: len(tokens)]  # given up during its prompt: the rest of it was skipped, and rightly so
        if tokens != wanted:
            raise InvariantBroken(f"L3: {who} holds {tokens}, not {wanted}")

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
