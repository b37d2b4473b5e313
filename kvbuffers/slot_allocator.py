"""The allocator of slots: who hands them out, and when they may be used again.

Theory of operation. One role leads each stream of runs (the orchestrator for the target's stages, a drafter for its own
shard) and it alone decides which slot a row gets. It keeps this allocator; the shards keep a SlotTable that replays its
decisions.

    lease    a run gets a private partition: slots that no other run writes
    commit   a slot whose token was accepted joins the canonical sequence, which outlives its run
    release  a slot whose token died becomes free
    clear    everything becomes free: a new request

Commits and releases are operations that ride in the next run of the stream. Every shard handles runs in stream order,
so a slot may be leased again in the very run that carries its release: whatever an older run still writes there at some
stage, it writes before the newer one does, and nobody alive looks at it in between. No acknowledgement is needed, no
slot rests, and no tensor is copied.

Two bounds keep speculation from ever blocking the request. At most ``speculative`` leased slots may be uncommitted at a
time; beyond it a lease is refused and the policy sends less. The rest is enough for every accepted token, so the run
that carries the tree's root always finds a slot.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.protocol import MAX_OPS, NO_SLOT, Row, SlotOp, SlotOpKind


class SlotAllocator:
    """Slots for ``accepted`` canonical tokens and ``speculative`` more in flight."""

    def __init__(self, accepted: int, speculative: int) -> None:
        self.capacity = accepted + speculative
        self.speculative = speculative
        self.length = 0  # canonical tokens
        self._free: list[int] = []  # ascending
        self._leased: set[int] = set()
        self._canonical: set[int] = set()
        self._ops: list[SlotOp] = []
        self._released: list[int] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything; the next operations begin with CLEAR."""
        self._free = list(range(self.capacity))
        self._leased.clear()
        self._canonical.clear()
        self._released.clear()
        self._ops = [SlotOp(SlotOpKind.CLEAR)]
        self.length = 0

    def room(self) -> int:
        """How many slots speculation may still lease."""
        coming = min(len(self._released), MAX_OPS - len(self._ops))
        return max(0, min(self.speculative - len(self._leased), len(self._free) + coming))

    def lease(self, count: int) -> list[int]:
        """``count`` private slots, lowest first. Call ``operations`` before, so that released slots are free again."""
        if count > len(self._free):
            raise LocalProtocolError(f"{count} slots wanted, {len(self._free)} of {self.capacity} are free")
        slots = self._free[:count]
        del self._free[:count]
        self._leased.update(slots)
        return slots

    def prompt_rows(self, tokens: Sequence[int]) -> tuple[tuple[SlotOp, ...], list[Row]]:
        """The next tokens of a prompt, as rows that extend the canonical sequence by themselves (Flag.CANONICAL), and
        the operations that go before them."""
        ops = self.operations()
        slots = self.lease(len(tokens))
        self._leased.difference_update(slots)
        self._canonical.update(slots)
        start, self.length = self.length, self.length + len(slots)
        places = enumerate(zip(tokens, slots, strict=True), start)
        return ops, [Row(token, slot, NO_SLOT, position) for position, (token, slot) in places]

    def commit(self, slot: int) -> None:
        """The slot of the next accepted token: it joins the canonical sequence."""
        self._leased.remove(slot)
        self._canonical.add(slot)
        last = self._ops[-1] if self._ops else None
        if last and last.kind is SlotOpKind.COMMIT and last.slot + last.length == slot:
            self._ops[-1] = last._replace(length=last.length + 1)
        else:
            self._ops.append(SlotOp(SlotOpKind.COMMIT, slot, 1, self.length))
        self.length += 1

    def release(self, *slots: int) -> None:
        """The slots of tokens that died."""
        held = len(self._leased)
        self._leased.difference_update(slots)
        if held - len(self._leased) != len(slots):
            raise LocalProtocolError(f"slots {slots} are not all leased")
        self._released += slots

    def operations(self) -> tuple[SlotOp, ...]:
        """What must ride in the run that is about to leave; the slots released by it may be leased to that run.

        Releases that do not fit wait for the next run, and so do their slots."""
        ops, self._ops = self._ops, []
        released, first = sorted(self._released), 0
        for place, slot in enumerate(released, 1):
            if place < len(released) and released[place] == slot + 1:
                continue
            if len(ops) >= MAX_OPS:
                break
            ops.append(SlotOp(SlotOpKind.RELEASE, released[first], place - first))
            first = place
        self._free += released[:first]
        self._free.sort()
        self._released = released[first:]
        return tuple(ops)

    def counts(self) -> tuple[int, int, int]:
        """How many slots are free (or about to be), leased, canonical."""
        return len(self._free) + len(self._released), len(self._leased), len(self._canonical)

    def check(self) -> None:
        """Raise AssertionError where the allocator contradicts itself (invariant L3)."""
        free = set(self._free) | set(self._released)
        assert len(free) == len(self._free) + len(self._released), "a slot is free twice"
        assert not (free & self._leased or free & self._canonical or self._leased & self._canonical), "a slot twice"
        assert len(free) + len(self._leased) + len(self._canonical) == self.capacity, "a slot is lost"
        assert len(self._canonical) == self.length, "the canonical length is off"
