"""The free slots of a pool, handed out in blocks, so that the slots of a sequence are neighbours.

A block is BLOCK neighbouring slots; the last one may be shorter. A sequence takes slots

    1. from the blocks that it owns, lowest slot first,
    2. from the lowest wholly free block, which it owns from then on,
    3. where no block is wholly free, from any block, lowest slot first.

So no capacity is lost to blocks, and a sequence that is alone in the pool gets the lowest free slots. A wholly free
block may still be owned: another sequence may take it over. To take or give k slots costs O(k log n), n being the
blocks of the pool.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heappop, heappush

BLOCK = 32
"""Slots of a block."""
NOBODY = -1
"""The owner of a block that has none."""


class _Lowest:
    """A set of numbers of which the lowest is known."""

    __slots__ = ("_heap", "_members")

    def __init__(self, count: int = 0) -> None:
        self._heap = list(range(count))
        self._members = set(self._heap)

    def push(self, number: int) -> None:
        """Put in ``number``, unless it is there."""
        if number not in self._members:
            self._members.add(number)
            heappush(self._heap, number)

    def lowest(self) -> int | None:
        """The lowest number, which stays; None if there is none."""
        return self._heap[0] if self._heap else None

    def pop(self) -> None:
        """Remove the lowest number."""
        self._members.remove(heappop(self._heap))


class FreeSlots:
    """The free ones of ``capacity`` slots; all at first."""

    def __init__(self, capacity: int) -> None:
        blocks, rest = divmod(capacity, BLOCK)
        self._full = [(1 << BLOCK) - 1] * blocks + [(1 << rest) - 1] * (rest > 0)
        self._mask = self._full.copy()  # of each block: bit i is set if its slot i is free
        self._owner = [NOBODY] * len(self._full)
        self._count = capacity
        # Blocks are removed from these when they turn out not to belong there any more.
        self._whole = _Lowest(len(self._full))
        self._partial = _Lowest()
        self._own: dict[int, _Lowest] = {}  # of each sequence: its blocks with a free slot

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for block, mask in enumerate(self._mask):
            yield from _slots(block, mask, BLOCK)

    def take(self, sequence: int, count: int) -> list[int]:
        """``count`` slots for ``sequence``, in the order in which it should use them. There must be as many."""
        slots, own = list[int](), self._own.get(sequence)
        if own is None:
            own = self._own[sequence] = _Lowest()
        while (left := count - len(slots)) > 0:
            block = self._block(sequence, own)
            found = _slots(block, self._mask[block], left)
            slots += found
            for slot in found:
                self._mask[block] ^= 1 << slot % BLOCK
            if self._mask[block]:
                self._partial.push(block)
        self._count -= count
        return slots

    def _block(self, sequence: int, own: _Lowest) -> int:
        """The block from which ``sequence`` takes its next slot. ``own``: its blocks."""
        while (block := own.lowest()) is not None:
            if self._owner[block] == sequence and self._mask[block]:
                return block
            own.pop()
        while (block := self._whole.lowest()) is not None:
            if self._mask[block] == self._full[block]:
                self._owner[block] = sequence
                own.push(block)
                return block
            self._whole.pop()
        while (block := self._partial.lowest()) is not None:
            if self._mask[block]:
                return block
            self._partial.pop()
        raise AssertionError("more slots are taken than are free")

    def give(self, slots: Iterable[int]) -> None:
        """``slots`` are free again."""
        given: dict[int, int] = {}  # block -> its slots, as a mask
        for slot in slots:
            block = slot // BLOCK
            given[block] = given.get(block, 0) | 1 << slot % BLOCK
            self._count += 1
        for block, mask in given.items():
            self._mask[block] |= mask
            self._partial.push(block)
            if self._mask[block] == self._full[block]:
                self._whole.push(block)
            if own := self._own.get(self._owner[block]):
                own.push(block)

    def forget(self, sequence: int) -> None:
        """``sequence`` owns no block any more."""
        self._own.pop(sequence, None)


def _slots(block: int, mask: int, most: int) -> list[int]:
    """The ``most`` lowest slots of ``mask`` in ``block``."""
    slots = list[int]()
    while mask and len(slots) < most:
        bit = mask & -mask
        slots.append(block * BLOCK + bit.bit_length() - 1)
        mask ^= bit
    return slots
