"""The allocator of slots: who hands them out, and when they may be used again.

Theory of operation. One role leads each stream of runs (the orchestrator for the target's stages, a drafter for its own
shard) and it alone decides which slot a row gets. It keeps this allocator; the shards keep a SlotTable that replays its
decisions.

    lease    a run gets a private set of slots: slots that no other run writes
    commit   a slot whose token was accepted joins its sequence's canonical slots, which outlive its run
    release  a slot whose token died becomes free
    free     a sequence gives up all its slots: its request is over
    fork     a sequence begins with the first canonical slots of another one, which both share from then on
    truncate a sequence keeps its first canonical slots and gives up all others

A leased slot belongs to one sequence. A canonical slot may be shared by forks. It is never written again, and becomes
free when no sequence has it. A sequence exists from its first lease or its fork on, until it is freed. A sequence
without leases (see retire) is a cached prefix. free_slots.py chooses the slots; those of a sequence are neighbours.

All but leases are operations that ride in the next run of the stream, whatever its sequence. Every shard handles runs
in stream order, so a slot may be leased again in the very run that carries its release: whatever an older run still
writes there at some stage, it writes before the newer one does, and nobody alive looks at it in between. No
acknowledgement is needed, no slot rests, and no tensor is copied.

Two bounds keep speculation from ever blocking a request. At most ``speculative`` leased slots may be uncommitted at a
time, those of all sequences together; beyond it a lease is refused and the policy sends less. The rest is enough for
every accepted token, so the run that carries the tree's root always finds a slot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvbuffers.free_slots import FreeSlots
from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.messages import MAX_KEPT, MAX_OPS, NO_SLOT, Row, SlotOp, SlotOpKind


class SlotAllocator:
    """Slots for ``accepted`` canonical tokens and ``speculative`` more in flight."""

    def __init__(self, accepted: int, speculative: int) -> None:
        self.capacity = accepted + speculative
        self.speculative = speculative
        self._free = FreeSlots(self.capacity)
        self._leased: dict[int, int] = {}  # slot -> sequence
        self._canonical: dict[int, list[int]] = {}  # sequence -> its canonical slots in order of position
        self._shared: dict[int, int] = {}  # slot -> how many sequences have it, if more than one
        self._released: dict[int, int] = {}  # slot -> sequence; free when the release has left
        self._freed: list[int] = []  # free when the next operations have left
        self._ops: list[SlotOp] = []

    def free(self, sequence: int) -> None:
        """Forget ``sequence``, if it has ever had a slot; the next operations free those that no other sequence has."""
        if sequence not in self._canonical:
            return
        leased = self._give_up(sequence, 0)
        del self._canonical[sequence]
        self._free.forget(sequence)
        kinds = {op.kind for op in self._ops if op.sequence == sequence}
        if not any(op.kind is SlotOpKind.FORK and op.slot == sequence for op in self._ops):
            self._ops = [op for op in self._ops if op.sequence != sequence or op.kind is SlotOpKind.FREE]
            if SlotOpKind.FORK in kinds and not leased:
                return  # it has never been heard of
        self._ops.append(SlotOp(SlotOpKind.FREE, sequence=sequence))

    def _give_up(self, sequence: int, length: int) -> int:
        """``sequence`` keeps its first ``length`` canonical slots only. Returns how many others it had leased."""
        canonical = self._canonical[sequence]
        for slot in canonical[length:]:
            others = self._shared.pop(slot, 1) - 1
            if others > 1:
                self._shared[slot] = others
            elif others == 0:
                self._freed.append(slot)
        del canonical[length:]
        count = 0
        for held in (self._leased, self._released):
            mine = [slot for slot, owner in held.items() if owner == sequence]
            count += len(mine)
            for slot in mine:
                del held[slot]
            self._freed += mine
        return count

    def fork(self, sequence: int, source: int, length: int) -> None:
        """Begin ``sequence``, which has no slot, with the first ``length`` canonical slots of ``source``."""
        if sequence in self._canonical:
            raise LocalProtocolError(f"sequence {sequence} is to begin as a fork of {source}, but has begun")
        if not 0 < length <= min(self.length(source), MAX_KEPT):
            raise LocalProtocolError(f"{length} slots to share, sequence {source} has {self.length(source)}")
        shared = self._canonical[sequence] = self._canonical[source][:length]
        for slot in shared:
            self._shared[slot] = self._shared.get(slot, 1) + 1
        self._ops.append(SlotOp(SlotOpKind.FORK, source, length, 0, sequence))

    def truncate(self, sequence: int, length: int) -> None:
        """``sequence`` keeps its first ``length`` canonical slots, and no leased one."""
        if not 0 <= length <= min(self.length(sequence), MAX_KEPT) or sequence not in self._canonical:
            raise LocalProtocolError(f"{length} slots to keep, sequence {sequence} has {self.length(sequence)}")
        self._give_up(sequence, length)
        self._ops.append(SlotOp(SlotOpKind.TRUNCATE, 0, length, 0, sequence))

    def retire(self, sequence: int) -> None:
        """Release all leased slots of ``sequence``; its canonical ones stay, until it is freed."""
        self.release(sequence, *[slot for slot, owner in self._leased.items() if owner == sequence])

    def held(self, sequence: int) -> int:
        """How many slots would become free with ``sequence``: those that no other sequence has."""
        canonical = self._canonical.get(sequence, ())
        shared = sum(slot in self._shared for slot in canonical) if self._shared else 0
        return len(canonical) - shared + sum(owner == sequence for owner in self._leased.values())

    def length(self, sequence: int) -> int:
        """How many canonical tokens ``sequence`` has."""
        return len(self._canonical.get(sequence, ()))

    def free_slots(self) -> int:
        """How many slots can be leased right after the next operations."""
        room = MAX_OPS - len(self._ops)
        coming = min(len(self._released), room) + len(self._freed) if room >= 0 else 0
        return len(self._free) + coming

    def room(self, reserve: int = 0) -> int:
        """How many slots speculation may still lease, for whatever sequences, if ``reserve`` slots are to stay free."""
        return max(0, min(self.speculative - len(self._leased), self.free_slots() - reserve))

    def lease(self, sequence: int, count: int) -> list[int]:
        """``count`` private slots; see free_slots.py. Call ``operations`` before, so that released slots are free."""
        slots = self._take(sequence, count)
        self._leased.update(dict.fromkeys(slots, sequence))
        return slots

    def _take(self, sequence: int, count: int) -> list[int]:
        """``count`` free slots; ``sequence`` exists from now on."""
        if count > len(self._free):
            raise LocalProtocolError(f"{count} slots wanted, {len(self._free)} of {self.capacity} are free")
        self._canonical.setdefault(sequence, [])
        return self._free.take(sequence, count)

    def prompt_rows(self, sequence: int, tokens: Sequence[int]) -> tuple[tuple[SlotOp, ...], list[Row]]:
        """The next tokens of a prompt, as rows that extend the canonical slots of ``sequence`` by themselves
        (Flag.CANONICAL), and the operations that go before them."""
        ops = self.operations()
        slots, start = self._take(sequence, len(tokens)), self.length(sequence)
        self._canonical[sequence] += slots
        places = enumerate(zip(tokens, slots, strict=True), start)
        return ops, [Row(token, slot, NO_SLOT, position, sequence) for position, (token, slot) in places]

    def commit(self, sequence: int, slot: int) -> None:
        """The slot of the next accepted token of ``sequence``: it becomes canonical."""
        self._own(sequence, slot)
        canonical = self._canonical[sequence]
        last = self._ops[-1] if self._ops else None
        is_next = last and last.kind is SlotOpKind.COMMIT and last.slot + last.length == slot
        if last and is_next and last.sequence == sequence:
            self._ops[-1] = last._replace(length=last.length + 1)
        else:
            self._ops.append(SlotOp(SlotOpKind.COMMIT, slot, 1, len(canonical), sequence))
        canonical.append(slot)

    def release(self, sequence: int, *slots: int) -> None:
        """The slots of tokens of ``sequence`` that died."""
        for slot in slots:
            self._own(sequence, slot)
            self._released[slot] = sequence

    def _own(self, sequence: int, slot: int) -> None:
        """``slot`` is leased to ``sequence``, and no longer."""
        if self._leased.pop(slot, None) != sequence:
            raise LocalProtocolError(f"slot {slot} is not leased to sequence {sequence}")

    def operations(self) -> tuple[SlotOp, ...]:
        """What must ride in the run that is about to leave; the slots released by it may be leased to that run.

        What does not fit waits for the next run, and so do its slots."""
        ops = self._leaving()
        released, first = sorted(self._released.items()), 0
        for place, (slot, sequence) in enumerate(released, 1):
            if place < len(released) and released[place] == (slot + 1, sequence):
                continue
            if len(ops) >= MAX_OPS:
                break
            ops.append(SlotOp(SlotOpKind.RELEASE, released[first][0], place - first, 0, sequence))
            first = place
        self._free.give([slot for slot, _ in released[:first]])
        self._released = dict(released[first:])
        if not self._ops:
            self._free.give(self._freed)
            self._freed = []
        return tuple(ops)

    def _leaving(self) -> list[SlotOp]:
        """Take the operations that leave now, releases excepted. If there are too many, those of sequences that were
        forked or truncated go first: their next rows need them. Commits of other sequences may wait: a row's parent may
        be a leased slot."""
        ops, self._ops = self._ops, []
        if len(ops) > MAX_OPS:
            urgent = {op.sequence for op in ops if op.kind in (SlotOpKind.FORK, SlotOpKind.TRUNCATE)}
            urgent |= {op.slot for op in ops if op.kind is SlotOpKind.FORK}
            ops.sort(key=lambda op: op.sequence not in urgent)  # keeps the order within a sequence
            ops, self._ops = ops[:MAX_OPS], ops[MAX_OPS:]
            if any(op.sequence in urgent for op in self._ops):
                raise LocalProtocolError(f"forks need more than {MAX_OPS} operations at once")
        return ops

    @property
    def leased(self) -> int:
        """How many slots are leased."""
        return len(self._leased)

    def counts(self) -> tuple[int, int, int]:
        """How many slots are free (or about to be), leased, canonical."""
        free = len(self._free) + len(self._released) + len(self._freed)
        canonical = sum(map(len, self._canonical.values())) - sum(self._shared.values()) + len(self._shared)
        return free, len(self._leased), canonical

    def check(self) -> None:
        """Raise AssertionError where the allocator contradicts itself (invariant L3)."""
        free = [*self._free, *self._released, *self._freed]
        holders = Counter(slot for slots in self._canonical.values() for slot in slots)
        assert len(free) == len(set(free)), "a slot is free twice"
        assert len(self._free) == len(list(self._free)), "free slots are counted wrongly"
        assert {slot: count for slot, count in holders.items() if count > 1} == self._shared, "a slot twice"
        assert len({*free, *self._leased, *holders}) == sum(self.counts()), "a slot twice"
        assert sum(self.counts()) == self.capacity, "a slot is lost"
        assert {*self._leased.values(), *self._released.values()} <= self._canonical.keys(), "a slot of no sequence"
