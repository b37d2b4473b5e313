"""The allocator of slots: who hands them out, and when they may be used again.

Theory of operation. One role leads each stream of runs (the orchestrator for the target's stages, a drafter for its own
shard) and it alone decides which slot a row gets. It keeps this allocator; the shards keep a SlotTable that replays its
decisions.

    lease    a run gets a private set of slots: slots that no other run writes
    commit   a slot whose token was accepted joins its sequence's canonical slots, which outlive its run
    release  a slot whose token died becomes free
    free     every slot of a sequence becomes free: its request is over

Each slot in use belongs to one sequence. A sequence exists from its first lease on, until it is freed.

Commits, releases and frees are operations that ride in the next run of the stream, whatever its sequence. Every shard
handles runs in stream order, so a slot may be leased again in the very run that carries its release: whatever an older
run still writes there at some stage, it writes before the newer one does, and nobody alive looks at it in between. No
acknowledgement is needed, no slot rests, and no tensor is copied.

Two bounds keep speculation from ever blocking a request. At most ``speculative`` leased slots may be uncommitted at a
time, those of all sequences together; beyond it a lease is refused and the policy sends less. The rest is enough for
every accepted token, so the run that carries the tree's root always finds a slot.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.messages import MAX_OPS, NO_SLOT, Row, SlotOp, SlotOpKind


class SlotAllocator:
    """Slots for ``accepted`` canonical tokens and ``speculative`` more in flight."""

    def __init__(self, accepted: int, speculative: int) -> None:
        self.capacity = accepted + speculative
        self.speculative = speculative
        self._free = list(range(self.capacity))  # ascending
        self._leased: dict[int, int] = {}  # slot -> sequence
        self._canonical: dict[int, list[int]] = {}  # sequence -> its canonical slots in order of position
        self._released: dict[int, int] = {}  # slot -> sequence; free when the release has left
        self._freed: list[int] = []  # free when the next operations have left
        self._ops: list[SlotOp] = []

    def free(self, sequence: int) -> None:
        """Forget ``sequence``, if it has ever had a slot; the next operations free all its slots."""
        if sequence not in self._canonical:
            return
        self._freed += self._canonical.pop(sequence)
        for held in (self._leased, self._released):
            mine = [slot for slot, owner in held.items() if owner == sequence]
            for slot in mine:
                del held[slot]
            self._freed += mine
        self._ops = [op for op in self._ops if op.sequence != sequence or op.kind is SlotOpKind.FREE]
        self._ops.append(SlotOp(SlotOpKind.FREE, sequence=sequence))

    def length(self, sequence: int) -> int:
        """How many canonical tokens ``sequence`` has."""
        return len(self._canonical.get(sequence, ()))

    def room(self) -> int:
        """How many slots speculation may still lease, for whatever sequences."""
        coming = min(len(self._released), MAX_OPS - len(self._ops)) + len(self._freed)
        return max(0, min(self.speculative - len(self._leased), len(self._free) + coming))

    def lease(self, sequence: int, count: int) -> list[int]:
        """``count`` private slots, lowest first. Call ``operations`` before, so that released slots are free again."""
        slots = self._take(sequence, count)
        self._leased.update(dict.fromkeys(slots, sequence))
        return slots

    def _take(self, sequence: int, count: int) -> list[int]:
        """The ``count`` lowest free slots; ``sequence`` exists from now on."""
        if count > len(self._free):
            raise LocalProtocolError(f"{count} slots wanted, {len(self._free)} of {self.capacity} are free")
        slots = self._free[:count]
        del self._free[:count]
        self._canonical.setdefault(sequence, [])
        return slots

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

        Releases that do not fit wait for the next run, and so do their slots."""
        ops, self._ops = self._ops, []
        released, first = sorted(self._released.items()), 0
        for place, (slot, sequence) in enumerate(released, 1):
            if place < len(released) and released[place] == (slot + 1, sequence):
                continue
            if len(ops) >= MAX_OPS:
                break
            ops.append(SlotOp(SlotOpKind.RELEASE, released[first][0], place - first, 0, sequence))
            first = place
        self._free += [slot for slot, _ in released[:first]]
        self._free += self._freed
        self._free.sort()
        self._released, self._freed = dict(released[first:]), []
        return tuple(ops)

    def counts(self) -> tuple[int, int, int]:
        """How many slots are free (or about to be), leased, canonical."""
        free = len(self._free) + len(self._released) + len(self._freed)
        return free, len(self._leased), sum(map(len, self._canonical.values()))

    def check(self) -> None:
        """Raise AssertionError where the allocator contradicts itself (invariant L3)."""
        free = [*self._free, *self._released, *self._freed]
        canonical = [slot for slots in self._canonical.values() for slot in slots]
        assert len(free) == len(set(free)), "a slot is free twice"
        assert len({*free, *self._leased, *canonical}) == sum(self.counts()), "a slot twice"
        assert sum(self.counts()) == self.capacity, "a slot is lost"
        assert {*self._leased.values(), *self._released.values()} <= self._canonical.keys(), "a slot of no sequence"
