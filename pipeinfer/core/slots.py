"""What the rows of a batch attend to: its lists of slots, and the mask that follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from pipeinfer.core.ports import Batch

Slots = npt.NDArray[np.int64]
FEW_RANGES = 8
"""Up to so many ranges a mask is set range by range, which is faster than slot by slot."""
FEW_SLOTS = 64
"""Up to so many slots Python finds the highest faster than numpy."""


def slots_of(ranges: Slots) -> Slots:
    """The slots in ``ranges`` [ranges, 2] of first slot and count, in order: int64 [any]."""
    if len(ranges) == 1:
        first, count = ranges[0].tolist()
        return np.arange(first, first + count)
    firsts, counts = ranges[:, 0], ranges[:, 1]
    ends = counts.cumsum()
    total = ends.item(-1) if len(ends) else 0
    if total == len(ranges):
        return firsts.copy()
    slots: Slots = np.arange(total) + (firsts - ends + counts).repeat(counts)
    return slots


def attended_by(batch: Batch, rows: Iterable[int]) -> list[Slots]:
    """The slots that each of ``rows`` of ``batch`` attends to, in order of position: an int64 [any] each."""
    canonical = [slots_of(ranges) for ranges in batch.canonical]
    ends, found = [0, *batch.ancestor_ends.tolist()], []
    for row in rows:
        first = canonical[batch.sequence.item(row)][: batch.prefix.item(row)]
        found.append(np.concatenate((first, batch.ancestors[ends[row] : ends[row + 1]])))
    return found


def attended(batch: Batch, row: int) -> Slots:
    """The slots that ``row`` of ``batch`` attends to, in order of position: int64 [any]."""
    return attended_by(batch, (row,))[0]


def visible_slots(batch: Batch) -> npt.NDArray[np.bool_]:
    """The mask of ``batch``: bool [rows, span]; row r attends to slot c if ``[r, c]``. ``span`` is one past the highest
    slot that is canonical in a sequence of the batch, or that a row attends to or writes."""
    rows = len(batch.slots)
    span = max(_span_of_rows(batch), *[_span_of_ranges(ranges) for ranges in batch.canonical])
    mask = np.zeros((rows, span), np.bool_)
    if len(batch.canonical) == 1:
        _mark_prefix(mask, batch.canonical[0], batch.prefix)
    else:
        for index, ranges in enumerate(batch.canonical):
            mine = (batch.sequence == index).nonzero()[0]
            part = np.zeros((len(mine), span), np.bool_)
            _mark_prefix(part, ranges, batch.prefix[mine])
            mask[mine] = part
    places = batch.ancestors  # in the mask, its rows one after the other
    if rows > 1:
        counts = batch.ancestor_ends.copy()
        counts[1:] -= batch.ancestor_ends[:-1]
        places = np.arange(0, rows * span, span).repeat(counts) + places
    mask.reshape(-1)[places] = True  # much faster than by row and column
    return mask


def _span_of_rows(batch: Batch) -> int:
    """One past the highest slot that a row of ``batch`` has among its ancestors or writes."""
    if len(batch.ancestors) <= FEW_SLOTS:
        highest: int = max(batch.slots.tolist() + batch.ancestors.tolist())
    else:
        highest = max(batch.slots.max().item(), batch.ancestors.max().item())
    return highest + 1


def _span_of_ranges(ranges: Slots) -> int:
    """One past the highest slot in ``ranges`` [ranges, 2]; 0 where there is none."""
    if len(ranges) <= FEW_RANGES:
        return max([first + count for first, count in ranges.tolist()], default=0)
    span: int = (ranges[:, 0] + ranges[:, 1]).max().item()
    return span


def _mark_prefix(mask: npt.NDArray[np.bool_], ranges: Slots, prefix: Slots) -> None:
    """Set in each row of ``mask`` [rows, span], which is all False, its first ``prefix`` [rows] slots of ``ranges``
    [ranges, 2]."""
    prefixes = prefix.tolist()
    least, most = min(prefixes), max(prefixes)
    by_all = mask[0]
    if len(ranges) > FEW_RANGES:
        slots = slots_of(ranges)
        by_all[slots[:least]] = True
    else:
        left = least
        for first, count in ranges.tolist():
            by_all[first : first + min(count, left)] = True
            left -= count
            if left <= 0:
                break
    if len(mask) > 1:
        mask[1:] = by_all
    if most > least:
        _mark_some(mask, ranges, prefix, least, most)


def _mark_some(mask: npt.NDArray[np.bool_], ranges: Slots, prefix: Slots, least: int, most: int) -> None:
    """Of the canonical slots at the positions ``least`` to ``most`` - 1, set those within a row's ``prefix``."""
    ends = ranges[:, 1].cumsum()
    index = int(ends.searchsorted(least, "right"))  # of the first range that is not below
    start, limit = ends.item(index) - ranges.item(index, 1), prefix.astype(np.int32)[:, None]
    for first, count in ranges[index:].tolist():
        if start >= most:
            break
        low, high = max(start, least), min(start + count, most)
        mask[:, first + low - start : first + high - start] = np.arange(low, high, dtype=np.int32) < limit
        start += count


def batch_in_order(tokens: Sequence[int] | Slots, first: int = 0) -> Batch:
    """The rows of a text whose token at position p is in slot p: ``tokens`` at the positions from ``first`` on, each
    attending to all before it and itself."""
    rows = len(tokens)
    positions, canonical = np.arange(first, first + rows), np.array([[0, first + rows]])
    here = np.array(tokens), positions, positions
    sequence, ends = np.zeros(rows, np.int64), np.arange(1, rows + 1)
    return Batch(*here, (canonical,), sequence, positions, positions, ends)
