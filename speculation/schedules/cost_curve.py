"""What a pass of so many rows takes, as measured, and how many rows are therefore worth sending.

Kernels are no straight lines: where two or three rows take nearly twice as long as one, eight may take hardly longer.
So every number of rows is remembered for itself. Where rows begin to cost there is a bend, and a straight line between
what is known would hide it: there the curve runs half-way to where the slopes on both sides meet, so that a promising
number of rows is tried, and then known. Beyond what is known it goes on as over the last doubling, and twice as many
rows may be tried as are known: runs grow from few, and where rows are dear nobody learns it from a run of many. Of
what fewer rows take half is taken to be fixed. What was not seen for long is forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

WEIGHT = 0.25
"""How much one pass counts against those before it."""
MOST_LATE = 1.25
"""How many times what is known of a number of rows one pass of it may count as."""
FORGET = 0.99
LEAST_S = 1e-6
"""What a pass takes at least: runs say what they cost in microseconds."""
LEAST_WEIGHT = 0.1
"""What is left of a measurement that is forgotten."""
BLIND = 4
"""How many rows may be tried while none are known."""
FIXED = 0.5
"""The share of a pass that fewer rows than any that was seen would not save."""
BEND = 0.5
"""How far between known numbers of rows the curve is from the straight line to where the slopes beside it meet."""
ROW_WORTH, LEAF_WORTH = 0.12, 0.5
"""How probable a guess must be, in what it costs to verify it (0.012 for a row that lengthens a pass by a tenth) and to
evaluate it in the draft. Found by trying, see docs/log.md."""


class CostCurve:
    """Seconds by rows."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._weights: dict[int, float] = {}
        self._known: list[int] = []  # numbers of rows, ascending
        self._by_rows: list[float] = []  # see _table; empty where that has to be made anew

    def observe(self, rows: int, seconds: float) -> None:
        """A pass of ``rows`` took ``seconds``. It may be late for many reasons and is never early: what is far above
        what is known counts as MOST_LATE times that; where this is the first of so many, as four times the curve."""
        seconds = max(seconds, LEAST_S)
        before = self._seconds.get(rows) if rows in self._weights else None
        if expected := self.seconds(rows):
            seconds = min(seconds, (4 if before is None else MOST_LATE) * expected)
        self._seconds[rows] = seconds if before is None else before + WEIGHT * (seconds - before)
        self._weights = {known: FORGET * weight for known, weight in self._weights.items()} | {rows: 1.0}
        for forgotten in [known for known, weight in self._weights.items() if weight < LEAST_WEIGHT]:
            del self._weights[forgotten], self._seconds[forgotten]
        self._known, self._by_rows = sorted(self._seconds), []

    def expect(self, rows: int, seconds: float) -> None:
        """One stage took ``seconds`` for ``rows``: believed until a run of as many is back. Where rows are dear it is
        known after one pass, not after a trip during which every run is too large."""
        seconds = max(seconds, LEAST_S)
        if rows not in self._weights and self._seconds.get(rows) != seconds:
            self._seconds[rows] = seconds
            self._known, self._by_rows = sorted(self._seconds), []

    @property
    def reach(self) -> int:
        """How many rows may be tried."""
        return max(BLIND, 2 * self._known[-1]) if self._known else BLIND

    def seconds(self, rows: int) -> float:
        """What a pass of ``rows`` takes; 0 while nothing is known."""
        return self._table(rows)[rows - 1] if self._known else 0.0

    def _table(self, rows: int) -> list[float]:
        """What passes of 1, 2 and so on take, to ``rows`` at least; something must be known."""
        known, seconds = self._known, self._seconds
        if len(self._by_rows) < rows:
            first, last = known[0], known[-1]
            table = [seconds[first] * (FIXED + (1.0 - FIXED) * few / first) for few in range(1, first)]
            slopes = [(seconds[high] - seconds[low]) / (high - low) for low, high in pairwise(known)]
            pieces = zip(pairwise(known), slopes, [0.0, *slopes], [*slopes[1:], *slopes[-1:]], strict=False)
            for (low, high), rise, before, after in pieces:
                for few in range(low, high):
                    line = seconds[low] + rise * (few - low)
                    meet = max(seconds[low] + max(0.0, before) * (few - low), seconds[high] - after * (high - few))
                    table.append(line - BEND * max(0.0, line - meet))
            table.append(seconds[last])
            half, rise = last // 2, 0.0
            if last >= BLIND and first <= half:
                rise = max(0.0, seconds[last] - table[half - 1]) / (last - half)
            table += [seconds[last] + rise * more for more in range(1, max(rows, 2 * last) - last + 1)]
            self._by_rows = table
        return self._by_rows

    def knows(self, rows: int) -> bool:
        """Whether what a pass of ``rows`` takes is more than hope."""
        return bool(self._known) and self._known[0] <= rows <= self._known[-1]

    def growth(self, rows: int, base: int) -> float:
        """How many times longer a pass of ``rows`` takes than one of ``base``."""
        base_s = self.seconds(base)
        return self.seconds(rows) / base_s if base_s > 0 else 1.0

    def least_probability(self, rows: int, most: float, worth: float = ROW_WORTH) -> float:
        """How probable a guess must be to be worth a row of up to ``rows``, never more than ``most``. Rows that cost
        nothing are worth sending however improbable; where nobody knows what they cost it is ``most``. ``worth``: see
        ROW_WORTH."""
        if len(self._known) < 2:
            return most
        return min(most, worth * max(0.0, self.growth(rows, 1) - 1.0) / max(1, rows - 1))

    def best_count(self, useful: Sequence[float]) -> int:
        """How many rows give the most useful ones per second; ``useful``: how much each is expected to count, in the
        order in which they go. The most of them, where several are equally good."""
        if not self._known or not useful:
            return len(useful)
        rates = [total / seconds for total, seconds in zip(accumulate(useful), self._table(len(useful)), strict=False)]
        return len(rates) - rates[::-1].index(max(rates))
