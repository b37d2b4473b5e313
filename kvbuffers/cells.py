"""The cell table: which cell holds which token, kept alike by every shard that follows one stream of runs.

Whoever leads the stream (see partitions.py) names a slot for each row. A shard only replays: operations first, then the
rows, in stream order. So all replicas agree without a word between them, and a row's attention mask follows from the
table alone:

    a row sees  its lineage: itself, its parent's cell, and so on up to the first canonical one
           and  every canonical cell at that one's position or before it.

Nothing is moved in memory: a cell becomes canonical by changing its state.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from pipeinfer.errors import RemoteProtocolError
from pipeinfer.ports import Batch, Draw, Sampling
from pipeinfer.protocol import NO_SLOT, CellOp, CellOpKind, Row


class CellTable:
    """``capacity`` cells, each free, leased to a run, or canonical at a position."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0  # canonical positions are 0 .. length-1
        self._canonical = np.zeros(capacity, dtype=np.bool_)
        self._position = np.zeros(capacity, dtype=np.int64)
        self._token = np.zeros(capacity, dtype=np.int64)
        self._leased: dict[int, int] = {}  # slot -> parent slot
        self._span = 0  # one past the highest cell ever used since it was last clear

    def apply(self, ops: Sequence[CellOp]) -> None:
        """Carry out ``ops`` in order; raises RemoteProtocolError where a correct leader would not have asked."""
        for op in ops:
            last = op.slot + op.cells
            if last > self.capacity:
                raise RemoteProtocolError(f"{op.kind.name} of cells {op.slot}..{last - 1}, there are {self.capacity}")
            if op.kind is CellOpKind.COMMIT:
                for index in range(op.cells):
                    self._commit(op.slot + index, op.position + index)
            elif op.kind is CellOpKind.RELEASE:
                for slot in range(op.slot, last):
                    if self._canonical[slot]:
                        raise RemoteProtocolError(f"release of canonical cell {slot}")
                    # A tombstone carries no rows, so a dead run's cells may never have been leased here.
                    self._leased.pop(slot, None)
            else:
                self._canonical[:] = False
                self._leased.clear()
                self.length = self._span = 0

    def _commit(self, slot: int, position: int) -> None:
        if position != self.length:
            raise RemoteProtocolError(f"commit of cell {slot} at position {position}, the next one is {self.length}")
        if slot not in self._leased or self._position[slot] != position:
            raise RemoteProtocolError(f"commit of cell {slot}, which no row put at position {position}")
        del self._leased[slot]
        self._canonical[slot] = True
        self.length += 1

    def living(self, rows: Sequence[Row], dead: Collection[int] = ()) -> tuple[int, ...]:
        """The indices of the rows that are not at ``dead`` cells and whose ancestors are all here, in order. Death is
        inherited: where an ancestor is missing, its run was skipped or its row dropped, and nothing below it can matter
        any more."""
        here: set[int] = set()
        alive = []
        for index, row in enumerate(rows):
            if row.slot not in dead and (
                row.parent == NO_SLOT
                or row.parent in self._leased
                or row.parent in here
                or self._is_canonical(row.parent)
            ):
                here.add(row.slot)
                alive.append(index)
        return tuple(alive)

    def admit(self, rows: Sequence[Row], canonical: bool = False) -> Batch:
        """Lease the rows' cells and say what each row sees; ``canonical`` rows become canonical at once."""
        count = len(rows)
        tokens = np.fromiter((row.token for row in rows), np.int64, count)
        positions = np.fromiter((row.position for row in rows), np.int64, count)
        slots = np.fromiter((row.slot for row in rows), np.int64, count)
        for row in rows:
            if row.slot >= self.capacity or row.slot in self._leased or self._canonical[row.slot]:
                raise RemoteProtocolError(f"row at cell {row.slot}, which is not free")
            self._position[row.slot] = row.position
            self._token[row.slot] = row.token
            self._leased[row.slot] = row.parent
            if canonical:
                self._commit(row.slot, row.position)
            self._span = max(self._span, row.slot + 1)
        span = self._span
        lineages = [] if canonical else [self._lineage(row) for row in rows]
        joins = positions if canonical else positions - np.fromiter(map(len, lineages), np.int64, count)
        visible = self._canonical[:span] & (self._position[:span] <= joins[:, None])
        for index, lineage in enumerate(lineages):
            visible[index, lineage] = True
        return Batch(tokens, positions, slots, visible)

    def draw(self, sampling: Sampling, batch: Batch, rows: Sequence[int], is_guess: bool = False) -> Draw:
        """How the tokens after ``rows`` of ``batch`` are drawn by ``sampling``."""
        seen: tuple[npt.NDArray[np.int64], ...] = ()
        if sampling.repetition_penalty != 1.0:
            tokens = self._token[: batch.visible.shape[1]]
            seen = tuple(np.unique(tokens[batch.visible[row]]) for row in rows)
        return Draw(sampling, batch.positions[list(rows)] + 1, seen, is_guess)

    def _is_canonical(self, slot: int) -> bool:
        return slot < self.capacity and bool(self._canonical[slot])

    def _lineage(self, row: Row) -> list[int]:
        """The leased cells from ``row`` up to, not including, the first canonical one."""
        path, slot, position = [], row.slot, row.position
        while slot in self._leased:
            if self._position[slot] != position:
                raise RemoteProtocolError(f"cell {slot} is at position {int(self._position[slot])}, not {position}")
            path.append(slot)
            slot, position = self._leased[slot], position - 1
        if slot != NO_SLOT and not self._is_canonical(slot):
            raise RemoteProtocolError(f"cell {row.slot} descends from cell {slot}, which is free")
        joint = self._position[slot] if slot != NO_SLOT else self.length - 1
        if position != joint:
            raise RemoteProtocolError(f"cell {row.slot} joins the canonical sequence at {position}, not at {joint}")
        return path

    def counts(self) -> tuple[int, int, int]:
        """How many cells are free, leased, canonical."""
        canonical = int(self._canonical.sum())
        return self.capacity - canonical - len(self._leased), len(self._leased), canonical

    def check(self) -> None:
        """Raise AssertionError where the table contradicts itself (law L3)."""
        positions = sorted(self._position[self._canonical].tolist())
        assert positions == list(range(self.length)), f"canonical positions {positions}"
        assert not any(self._canonical[slot] for slot in self._leased), "a cell is leased and canonical"
