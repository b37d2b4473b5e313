"""The slot table: which slot holds which token, kept alike by every shard that follows one stream of runs.

Whoever leads the stream (see slot_allocator.py) names a slot for each row. A shard only replays: operations first, then
the rows, in stream order. So all replicas agree without messages, and what a row attends to follows from the
table alone: what its parent attends to, and its own slot. That never changes: nothing is moved in memory, a slot
becomes canonical by changing its state. What a row attends to is a list of slots in order of position: so many of the
first canonical slots of its sequence, then the row's own ancestors, itself last. Ancestors that have become canonical
are counted among the former as soon as a child asks, so the rest stays short.

A canonical slot may be shared by several sequences, which were forked from each other. It is free when none has it.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import NO_SLOT, Row, SlotOp, SlotOpKind
from pipeinfer.core.ports import Batch, Sampling, SamplingInputs
from pipeinfer.core.slots import attended_by, slots_of

SLOT = struct.Struct("q")
"""A slot in a path: int64, as numpy has it."""
NO_TOKENS = np.zeros(0, np.int64)


@dataclass(slots=True)
class _Sequence:
    """What is known of one sequence.

    ``canonical``: slot -> position, in the order of positions. ``leased``: slot -> position, prefix, path. ``path``:
    the slots of the row's ancestors after the prefix and its own, packed by SLOT."""

    canonical: dict[int, int] = field(default_factory=dict)
    leased: dict[int, tuple[int, int, bytes]] = field(default_factory=dict)
    ranges: array[int] = field(default_factory=lambda: array("q"))  # first slot and count of each, flat
    next_slot: int = -1  # one past the last range
    copied: npt.NDArray[np.int64] | None = None  # the ranges as a batch has them, made when one asks

    def extend(self, slot: int) -> None:
        """``slot`` is the next canonical one."""
        self.canonical[slot] = len(self.canonical)
        self.copied = None
        if slot == self.next_slot:
            self.ranges[-1] += 1
        else:
            self.ranges.extend((slot, 1))
        self.next_slot = slot + 1

    def canonical_ranges(self) -> npt.NDArray[np.int64]:
        """int64 [ranges, 2]; never changed later."""
        if self.copied is None:
            self.copied = np.array(self.ranges, np.int64).reshape(-1, 2)
        return self.copied

    def beginning(self, length: int) -> _Sequence:
        """A new one, of the first ``length`` canonical slots."""
        begun = _Sequence()
        for slot in islice(self.canonical, length):
            begun.extend(slot)
        return begun

    def above(self, row: Row) -> tuple[int, bytes]:
        """What ``row``'s parent attends to: how many of the first canonical slots, and its path after those."""
        length = len(self.canonical)
        if row.parent in self.leased:
            position, prefix, path = self.leased[row.parent]
            if prefix < length:
                prefix, path = self._shortened(prefix, path)
                self.leased[row.parent] = position, prefix, path
        elif row.parent == NO_SLOT:
            position, prefix, path = length - 1, length, b""
        elif row.parent in self.canonical:
            position = self.canonical[row.parent]
            prefix, path = position + 1, b""
        else:
            raise RemoteProtocolError(f"slot {row.slot} descends from slot {row.parent}, which is free")
        if row.position != position + 1:
            raise RemoteProtocolError(f"slot {row.slot} is at position {row.position}, its parent at {position}")
        return prefix, path

    def _shortened(self, prefix: int, path: bytes) -> tuple[int, bytes]:
        """The same slots: those of the first in ``path`` that are canonical where they stand go to the prefix. The last
        one is leased and stays."""
        moved = 0
        for (slot,) in SLOT.iter_unpack(path):
            if self.canonical.get(slot) != prefix + moved:
                break
            moved += 1
        return prefix + moved, path[moved * SLOT.size :]


NOTHING = _Sequence()
"""What is known of a sequence that has no slot; never changed."""


class SlotTable:
    """``capacity`` slots, each free, leased to a run of a sequence, or canonical at a position of one."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._sequences: dict[int, _Sequence] = {}  # made at first use
        self._used: set[int] = set()  # leased or canonical
        self._shared: dict[int, int] = {}  # slot -> how many sequences have it, if more than one
        self._token = np.zeros(capacity, dtype=np.int64)

    def length(self, sequence: int = 0) -> int:
        """Canonical positions of ``sequence`` are 0 .. length - 1."""
        return len(self._sequences[sequence].canonical) if sequence in self._sequences else 0

    def apply(self, ops: Sequence[SlotOp]) -> None:
        """Carry out ``ops`` in order; raises RemoteProtocolError where a correct leader would not have asked."""
        commit, release, free, fork = SlotOpKind.COMMIT, SlotOpKind.RELEASE, SlotOpKind.FREE, SlotOpKind.FORK
        for op in ops:
            kind, first, length, position, _ = op
            if kind is fork:
                self._fork(op)
                continue
            last = first + length
            if last > self.capacity:
                raise RemoteProtocolError(f"{kind.name} of slots {first}..{last - 1}, there are {self.capacity}")
            if kind is free:  # of a sequence all of whose runs were skipped nothing is known
                freed = self._sequences.pop(op.sequence, NOTHING)
                self._give_up(freed.canonical)
                self._used.difference_update(freed.leased)
                continue
            state = self._state(op.sequence)
            if kind is commit:
                for index in range(length):
                    self._commit(state, first + index, position + index)
            elif kind is release:
                for slot in range(first, last):
                    # A tombstone carries no rows, so a dead run's slots may never have been leased here.
                    if state.leased.pop(slot, None) is not None:
                        self._used.remove(slot)
                    elif slot in self._used:
                        raise RemoteProtocolError(f"release of slot {slot}, which is canonical or of another sequence")
            else:
                self._truncate(op.sequence, length)

    def _state(self, sequence: int) -> _Sequence:
        """What is known of ``sequence``, from now on at least that it exists."""
        state = self._sequences.get(sequence)
        if state is None:
            state = self._sequences[sequence] = _Sequence()
        return state

    def _commit(self, state: _Sequence, slot: int, position: int) -> None:
        length = len(state.canonical)
        if position != length:
            raise RemoteProtocolError(f"commit of slot {slot} at position {position}, the next one is {length}")
        if slot not in state.leased or state.leased[slot][0] != position:
            raise RemoteProtocolError(f"commit of slot {slot}, which no row put at position {position}")
        del state.leased[slot]
        state.extend(slot)

    def _truncate(self, sequence: int, length: int) -> None:
        """The first ``length`` canonical positions of ``sequence`` stay, and nothing else of it."""
        state = self._sequences[sequence]
        if length > len(state.canonical):
            raise RemoteProtocolError(f"sequence {sequence} is to keep {length} of {len(state.canonical)} positions")
        self._give_up(islice(state.canonical, length, None))
        self._used.difference_update(state.leased)
        self._sequences[sequence] = state.beginning(length)

    def _give_up(self, canonical: Iterable[int]) -> None:
        """A sequence has these canonical slots no more."""
        if not self._shared:
            self._used.difference_update(canonical)
            return
        for slot in canonical:
            others = self._shared.pop(slot, 1) - 1
            if others > 1:
                self._shared[slot] = others
            elif others == 0:
                self._used.remove(slot)

    def _fork(self, op: SlotOp) -> None:
        """A sequence begins with the first canonical slots of another one."""
        state, source = self._state(op.sequence), self._sequences.get(op.slot, NOTHING)
        if state.canonical or state.leased:
            raise RemoteProtocolError(f"sequence {op.sequence} is to begin as a fork of {op.slot}, but has slots")
        if not 0 < op.length <= len(source.canonical):
            raise RemoteProtocolError(
                f"sequence {op.sequence} is to share {op.length} slots of {op.slot}, which has {len(source.canonical)}"
            )
        self._sequences[op.sequence] = begun = source.beginning(op.length)
        for slot in begun.canonical:
            self._shared[slot] = self._shared.get(slot, 1) + 1

    def living(self, rows: Sequence[Row], dead: Collection[int] = ()) -> tuple[int, ...]:
        """The indices of the rows that are not at ``dead`` slots and whose ancestors are all here, in order. Death is
        inherited: where an ancestor is missing, its run was skipped or its row dropped, and nothing below it can matter
        any more."""
        here: dict[int, int] = {}  # slot -> sequence
        alive = []
        for index, row in enumerate(rows):
            state = self._sequences.get(row.sequence, NOTHING)
            if row.slot not in dead and (
                row.parent == NO_SLOT
                or row.parent in state.leased
                or here.get(row.parent) == row.sequence
                or row.parent in state.canonical
            ):
                here[row.slot] = row.sequence
                alive.append(index)
        return tuple(alive)

    def allocate(self, rows: Sequence[Row], canonical: bool = False) -> Batch:
        """Lease the rows' slots, parents first, and return what each row attends to; ``canonical`` rows become
        canonical at once."""
        used, capacity, pack = self._used, self.capacity, SLOT.pack
        indices: dict[int, int] = {}  # sequence -> its index in the batch
        sequence, state = rows[0].sequence, self._state(rows[0].sequence)
        indices[sequence] = 0
        prefixes, ends, paths, end = list[int](), list[int](), list[bytes](), 0
        for row in rows:
            slot = row.slot
            if slot >= capacity or slot in used:
                raise RemoteProtocolError(f"row at slot {slot}, which is not free")
            if row.sequence != sequence:
                sequence, state = row.sequence, self._state(row.sequence)
                indices.setdefault(sequence, len(indices))
            prefix, path = state.above(row)
            path += pack(slot)
            used.add(slot)
            prefixes.append(prefix)
            paths.append(path)
            end += len(path) // SLOT.size
            ends.append(end)
            if canonical:
                if row.position != len(state.canonical):
                    raise RemoteProtocolError(f"canonical slot {slot} at position {row.position}, before the end")
                state.extend(slot)
            else:
                state.leased[slot] = row.position, prefix, path
        return self._batch(rows, indices, prefixes, paths, ends)

    def _batch(
        self,
        rows: Sequence[Row],
        indices: dict[int, int],
        prefixes: list[int],
        paths: list[bytes],
        ends: list[int],
    ) -> Batch:
        """``rows`` as a Batch, and their tokens noted. ``indices``: of each sequence in ``canonical``."""
        tokens, slots, _, positions, names = zip(*rows, strict=True)
        each = np.array((tokens, positions, slots, prefixes, ends), np.int64)  # one conversion, as each takes long
        self._token[each[2]] = each[0]
        if len(indices) == 1:
            sequence = np.zeros(len(rows), np.int64)
        else:
            sequence = np.array([indices[name] for name in names], np.int64)
        ranges = tuple([self._sequences[name].canonical_ranges() for name in indices])
        ancestors = np.frombuffer(b"".join(paths), np.int64)
        return Batch(each[0], each[1], each[2], ranges, sequence, each[3], ancestors, each[4])

    def draw(
        self, samplings: Sequence[Sampling], batch: Batch, rows: Sequence[int], is_guess: bool = False
    ) -> SamplingInputs:
        """How the tokens after ``rows`` of ``batch`` are drawn, each by its own one of ``samplings``."""
        repeats = [sampling.repetition_penalty != 1.0 for sampling in samplings]
        counts = [sampling.penalises_generated for sampling in samplings]
        needing = [index for index in range(len(rows)) if repeats[index] or counts[index]]
        if not needing:
            return SamplingInputs(tuple(samplings), batch.positions[list(rows)] + 1, (), is_guess)
        texts = [NO_TOKENS] * len(rows)
        for index, slots in zip(needing, attended_by(batch, [rows[index] for index in needing]), strict=True):
            texts[index] = self._token[slots]
        seen = [np.unique(text) if is_seen else NO_TOKENS for text, is_seen in zip(texts, repeats, strict=True)]
        generated = [
            text[sampling.prompt_length :] if is_counted else NO_TOKENS
            for text, sampling, is_counted in zip(texts, samplings, counts, strict=True)
        ]
        found = tuple(seen) if any(repeats) else (), tuple(generated) if any(counts) else ()
        return SamplingInputs(tuple(samplings), batch.positions[list(rows)] + 1, found[0], is_guess, found[1])

    def counts(self) -> tuple[int, int, int]:
        """How many slots are free, leased, canonical."""
        leased = sum(len(state.leased) for state in self._sequences.values())
        return self.capacity - len(self._used), leased, len(self._used) - leased

    def check(self) -> None:
        """Raise AssertionError where the table contradicts itself (invariant L3)."""
        leased, holders = 0, Counter[int]()
        for name, state in self._sequences.items():
            length = len(state.canonical)
            positions = list(state.canonical.values())
            assert positions == list(range(length)), f"canonical positions {positions} of sequence {name}"
            ranges = state.canonical_ranges()
            assert slots_of(ranges).tolist() == list(state.canonical), f"ranges {ranges.tolist()} of sequence {name}"
            assert not state.leased.keys() & state.canonical.keys(), "a slot is leased and canonical"
            assert self._used >= state.leased.keys() | state.canonical.keys(), "a slot is used and free"
            leased += len(state.leased)
            holders.update(iter(state.canonical))
        assert {slot: count for slot, count in holders.items() if count > 1} == self._shared, "a slot is shared wrongly"
        assert leased + len(holders) == len(self._used), "a slot is used by nobody, or twice"
