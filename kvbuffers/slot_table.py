"""The slot table: which slot holds which token, kept alike by every shard that follows one stream of runs.

Whoever leads the stream (see partitions.py) names a slot for each row. A shard only replays: operations first, then the
rows, in stream order. So all replicas agree without a word between them, and a row's attention mask follows from the
table alone: it sees what its parent sees, and its own slot. That never changes: nothing is moved in memory, a slot
becomes canonical by changing its state. Such a *visible_slots* is a set of slots, kept as the bits of an integer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.ports import Batch, Sampling, SamplingInputs
from pipeinfer.core.protocol import NO_SLOT, Row, SlotOp, SlotOpKind


class SlotTable:
    """``capacity`` slots, each free, leased to a run, or canonical at a position."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._canonical: dict[int, int] = {}  # slot -> position, in the order of positions
        self._text = 0  # what the last canonical slot attends to: all of them
        self._leased: dict[int, tuple[int, int]] = {}  # slot -> position, what it attends to
        self._token = np.zeros(capacity, dtype=np.int64)
        self._span = 0  # one past the highest slot ever used since it was last clear

    @property
    def length(self) -> int:
        """Canonical positions are 0 .. length - 1."""
        return len(self._canonical)

    def apply(self, ops: Sequence[SlotOp]) -> None:
        """Carry out ``ops`` in order; raises RemoteProtocolError where a correct leader would not have asked."""
        for op in ops:
            last = op.slot + op.length
            if last > self.capacity:
                raise RemoteProtocolError(f"{op.kind.name} of slots {op.slot}..{last - 1}, there are {self.capacity}")
            if op.kind is SlotOpKind.COMMIT:
                for index in range(op.length):
                    self._commit(op.slot + index, op.position + index)
            elif op.kind is SlotOpKind.RELEASE:
                for slot in range(op.slot, last):
                    if slot in self._canonical:
                        raise RemoteProtocolError(f"release of canonical slot {slot}")
                    # A tombstone carries no rows, so a dead run's slots may never have been leased here.
                    self._leased.pop(slot, None)
            else:
                self._canonical.clear()
                self._leased.clear()
                self._text = self._span = 0

    def _commit(self, slot: int, position: int) -> None:
        if position != self.length:
            raise RemoteProtocolError(f"commit of slot {slot} at position {position}, the next one is {self.length}")
        if slot not in self._leased or self._leased[slot][0] != position:
            raise RemoteProtocolError(f"commit of slot {slot}, which no row put at position {position}")
        del self._leased[slot]
        self._canonical[slot] = position
        self._text |= 1 << slot

    def living(self, rows: Sequence[Row], dead: Collection[int] = ()) -> tuple[int, ...]:
        """The indices of the rows that are not at ``dead`` slots and whose ancestors are all here, in order. Death is
        inherited: where an ancestor is missing, its run was skipped or its row dropped, and nothing below it can matter
        any more."""
        here: set[int] = set()
        alive = []
        for index, row in enumerate(rows):
            if row.slot not in dead and (
                row.parent == NO_SLOT
                or row.parent in self._leased
                or row.parent in here
                or row.parent in self._canonical
            ):
                here.add(row.slot)
                alive.append(index)
        return tuple(alive)

    def allocate(self, rows: Sequence[Row], canonical: bool = False) -> Batch:
        """Lease the rows' slots, parents first, and say what each row sees; ``canonical`` rows become canonical at
        once."""
        sights = []
        for row in rows:
            if row.slot >= self.capacity or row.slot in self._leased or row.slot in self._canonical:
                raise RemoteProtocolError(f"row at slot {row.slot}, which is not free")
            visible_slots = self._sight_above(row) | 1 << row.slot
            sights.append(visible_slots)
            self._leased[row.slot] = row.position, visible_slots
            if canonical:
                self._commit(row.slot, row.position)
        tokens, slots, _, positions = (np.array(column, np.int64) for column in zip(*rows, strict=True))
        self._token[slots] = tokens
        self._span = max(self._span, max(sights).bit_length())
        return Batch(tokens, positions, slots, self._visible(sights))

    def _sight_above(self, row: Row) -> int:
        """What ``row``'s parent sees."""
        if row.parent in self._leased:
            position, visible_slots = self._leased[row.parent]
        elif row.parent == NO_SLOT:
            position, visible_slots = self.length - 1, self._text
        elif row.parent in self._canonical:
            position, visible_slots = self._canonical[row.parent], self._text
            for later in islice(reversed(self._canonical), self.length - 1 - position):
                visible_slots ^= 1 << later
        else:
            raise RemoteProtocolError(f"slot {row.slot} descends from slot {row.parent}, which is free")
        if row.position != position + 1:
            raise RemoteProtocolError(f"slot {row.slot} is at position {row.position}, its parent at {position}")
        return visible_slots

    def _visible(self, sights: Sequence[int]) -> npt.NDArray[np.bool_]:
        """``sights`` [rows] as a mask [rows, span]."""
        nbytes = (self._span + 7) // 8
        bits = np.frombuffer(b"".join(visible_slots.to_bytes(nbytes, "little") for visible_slots in sights), np.uint8)
        mask = np.unpackbits(bits.reshape(-1, nbytes), axis=1, count=self._span, bitorder="little")
        return mask.view(np.bool_)

    def draw(self, sampling: Sampling, batch: Batch, rows: Sequence[int], is_guess: bool = False) -> SamplingInputs:
        """How the tokens after ``rows`` of ``batch`` are drawn by ``sampling``."""
        seen: tuple[npt.NDArray[np.int64], ...] = ()
        if sampling.repetition_penalty != 1.0:
            tokens = self._token[: batch.visible.shape[1]]
            seen = tuple(np.unique(tokens[batch.visible[row]]) for row in rows)
        return SamplingInputs(sampling, batch.positions[list(rows)] + 1, seen, is_guess)

    def counts(self) -> tuple[int, int, int]:
        """How many slots are free, leased, canonical."""
        leased, canonical = len(self._leased), len(self._canonical)
        return self.capacity - leased - canonical, leased, canonical

    def check(self) -> None:
        """Raise AssertionError where the table contradicts itself (invariant L3)."""
        positions = list(self._canonical.values())
        assert positions == list(range(self.length)), f"canonical positions {positions}"
        assert not self._leased.keys() & self._canonical.keys(), "a slot is leased and canonical"
