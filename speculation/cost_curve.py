"""What a pass of so many rows takes, as measured, and how many rows are therefore worth sending.

Kernels are no straight lines: where two or three rows take nearly twice as long as one, eight may take hardly longer.
So every number of rows is remembered for itself, and between two that are known the curve is straight. Beyond them it
is hopeful, so that what has not been tried is tried: more rows take no longer, and of what fewer take only half is
taken to be fixed. What was not seen for long is forgotten.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

WEIGHT = 0.25
"""How much one pass counts against those before it."""
MOST_LATE = 1.25
"""How many times what is known of a number of rows one pass of it may count as."""
FORGET = 0.99
LEAST_WEIGHT = 0.1
"""What is left of a measurement that is forgotten."""
FIXED = 0.5
"""The share of a pass that fewer rows than any that was seen would not save."""
ROW_WORTH, LEAF_WORTH = 0.12, 0.5
"""How probable a guess must be, in what it costs to verify it (0.012 for a row that lengthens a pass by a tenth) and to
evaluate it in the draft. Found by trying, see docs/log.md."""


class CostCurve:
    """Seconds by rows."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._weights: dict[int, float] = {}
        self._known: list[int] = []  # numbers of rows, ascending

    def observe(self, rows: int, seconds: float) -> None:
        """A pass of ``rows`` took ``seconds``. It may be late for many reasons and is never early: what is far above
        what is known counts as MOST_LATE times that; where this is the first of so many, as four times the curve."""
        before = self._seconds.get(rows) if rows in self._weights else None
        if expected := self.seconds(rows):
            seconds = min(seconds, (4 if before is None else MOST_LATE) * expected)
        self._seconds[rows] = seconds if before is None else before + WEIGHT * (seconds - before)
        self._weights = {known: FORGET * weight for known, weight in self._weights.items()} | {rows: 1.0}
        for forgotten in [known for known, weight in self._weights.items() if weight < LEAST_WEIGHT]:
            del self._weights[forgotten], self._seconds[forgotten]
        self._known = sorted(self._seconds)

    def expect(self, rows: int, seconds: float) -> None:
        """One stage took ``seconds`` for ``rows``: believed until a run of as many is back. Where rows are dear it is
        known after one pass, not after a trip during which every run is too large."""
        if rows not in self._weights:
            self._seconds[rows] = seconds
            self._known = sorted(self._seconds)

    def seconds(self, rows: int) -> float:
        """What a pass of ``rows`` takes; 0 while nothing is known."""
        known = self._known
        if rows in self._seconds or not known:
            return self._seconds.get(rows, 0.0)
        place = bisect_left(known, rows)
        if place == 0:
            return self._seconds[known[0]] * (FIXED + (1.0 - FIXED) * rows / known[0])
        if place == len(known):
            return self._seconds[known[-1]]
        low, high = known[place - 1], known[place]
        share = (rows - low) / (high - low)
        return self._seconds[low] + share * (self._seconds[high] - self._seconds[low])

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
        best, best_rate, total = 0, -1.0, 0.0
        for count, share in enumerate(useful, 1):
            total += share
            seconds = self.seconds(count)
            if seconds <= 0:
                return len(useful)
            if total / seconds >= best_rate:
                best, best_rate = count, total / seconds
        return best
