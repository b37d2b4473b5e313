"""The online latency model of a pass: T(r), the seconds that the slowest stage takes for r rows.

    estimate of T(r)         <- (1 - WEIGHT) T(r) + WEIGHT x        for a measured pass of r rows and x seconds
    rows of a run            argmax over k of (u_1 + ... + u_k) / T(k), the useful rows per second
    least path probability   ROW_WORTH (T(r) / T(1) - 1) / (r - 1), at most the policy's ``min_path_prob``

u_i is the probability that row i is useful; rows are sorted by it. Every number of rows has its own estimate, because
kernels are not linear: two or three rows may take twice as long as one, and eight hardly longer than three. Other
numbers of rows are interpolated from the measured ones:

- Between two measured numbers T is the straight line, lowered by BEND times its distance from the higher one of the two
  neighbouring segments' extensions. The curve may bend there, and the lower estimate makes the scheduler try such a
  number.
- Above the largest measured number m, T continues with the slope between m / 2 and m.
- Below the smallest measured number m, T(r) = T(m) (FIXED + (1 - FIXED) r / m).

Runs may have at most twice the largest measured number of rows, so runs start small and double. Measurements that were
not repeated are forgotten.

A *prior* is what a pass took when the models were loaded, by its rows. It stands in for measurements that there are not
(yet, or any more), multiplied by the ratio of measured to prior times: a busy machine makes all passes longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

Costs = tuple[tuple[int, float], ...]
"""Seconds of a pass by its number of rows, each number at most once."""

WEIGHT = 0.25
"""Weight of a new measurement in the exponentially weighted mean."""
MOST_LATE = 1.25
"""A measurement counts as at most this multiple of the estimate."""
FORGET = 0.99
"""Decay per pass of the weights of all other measurements."""
LEAST_S = 1e-6
"""Least time of a pass: run headers carry microseconds."""
LEAST_WEIGHT = 0.1
"""A measurement with a lower weight is forgotten."""
BLIND = 4
"""Most rows of a run while nothing is measured."""
FIXED = 0.5
"""Share of the smallest measured pass that is independent of the number of rows."""
BEND = 0.5
"""Position between the straight line (0) and the neighbouring segments' extensions (1)."""
ROW_WORTH, LEAF_WORTH = 0.12, 0.5
"""Least path probability per relative cost of a row in the target (0.012 for a row that lengthens a pass by a tenth)
and of a leaf in the draft. Tuned by experiment, see docs/log.md."""
PRIOR_WEIGHT = 0.5
"""Weight of the first measurement beside a prior of the same number of rows."""


class Priors(NamedTuple):
    """What passes took when the models were loaded: ``rows`` of the slowest stage, ``trips`` of all stages in turn,
    ``drafts`` of the draft model. Empty for what is unknown."""

    rows: Costs = ()
    trips: Costs = ()
    drafts: Costs = ()


NO_PRIORS = Priors()


class CostCurve:
    """T(r): seconds of a pass by its rows. ``prior``: what is known of it before anything is measured."""

    def __init__(self, prior: Costs = ()) -> None:
        self._prior = {rows: max(seconds, LEAST_S) for rows, seconds in prior}
        self._base: CostCurve | None = None  # of the prior alone
        self._scale = 1.0  # measured / prior seconds
        self._seconds: dict[int, float] = dict(self._prior)
        self._weights: dict[int, float] = {}
        self._known: list[int] = []  # measured numbers of rows, ascending
        self._by_rows: list[float] = []  # see _table; empty if out of date
        if prior:
            self._base = CostCurve()
            self._base._seconds = dict(self._prior)
            self._base._sort()
        self._sort()

    def _sort(self) -> None:
        self._known, self._by_rows = sorted(self._seconds), []

    def observe(self, rows: int, seconds: float) -> None:
        """A pass of ``rows`` took ``seconds``. A pass may be late for many reasons and is never early, so a long time
        is clipped to MOST_LATE times the estimate, or to four times the curve if this number of rows is new."""
        seconds = max(seconds, LEAST_S)
        before, weight = self._seconds.get(rows) if rows in self._weights else None, WEIGHT
        if expected := self.seconds(rows):
            seconds = min(seconds, (4 if before is None else MOST_LATE) * expected)
        if before is None and rows in self._prior:
            before, weight = self._seconds[rows], PRIOR_WEIGHT
        self._rescale(rows, seconds)
        self._seconds[rows] = seconds if before is None else before + weight * (seconds - before)
        self._weights = {known: FORGET * weight for known, weight in self._weights.items()} | {rows: 1.0}
        for forgotten in [known for known, weight in self._weights.items() if weight < LEAST_WEIGHT]:
            del self._weights[forgotten], self._seconds[forgotten]
        for known, prior_s in self._prior.items():
            if known not in self._weights:
                self._seconds[known] = self._scale * prior_s
        self._sort()

    def _rescale(self, rows: int, seconds: float) -> None:
        """Compare a measurement with the prior."""
        if self._base is not None:
            weight = WEIGHT if self._weights else PRIOR_WEIGHT
            self._scale += weight * (seconds / self._base.seconds(rows) - self._scale)

    def expect(self, rows: int, seconds: float) -> None:
        """One stage took ``seconds`` for ``rows``. This value is used until a run of as many rows returns, so that
        expensive rows are known after one pass and not only after a pipeline trip. A prior is of the slowest stage, and
        is lowered by nothing that another one took."""
        seconds = max(seconds, LEAST_S, self._scale * self._prior.get(rows, 0.0))
        if rows not in self._weights and self._seconds.get(rows) != seconds:
            self._seconds[rows] = seconds
            self._sort()

    @property
    def reach(self) -> int:
        """The most rows that a run may have."""
        return max(BLIND, 2 * self._known[-1]) if self._known else BLIND

    def seconds(self, rows: int) -> float:
        """T(rows); 0 while nothing is measured."""
        measured = self._seconds.get(rows)  # what the table says too, but it would have to be made
        return measured if measured is not None else self._table(rows)[rows - 1] if self._known else 0.0

    def _table(self, rows: int) -> list[float]:
        """T(1), T(2), ..., at least up to ``rows``; something must be measured."""
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
        """Whether T(rows) is measured or interpolated, not extrapolated."""
        return bool(self._known) and self._known[0] <= rows <= self._known[-1]

    def growth(self, rows: int, base: int) -> float:
        """T(rows) / T(base)."""
        base_s = self.seconds(base)
        return self.seconds(rows) / base_s if base_s > 0 else 1.0

    def least_probability(self, rows: int, most: float, worth: float = ROW_WORTH) -> float:
        """The least path probability that is worth a row of a run of up to ``rows`` rows, at most ``most``: 0 for rows
        that cost nothing, ``most`` while fewer than two numbers of rows are measured. ``worth``: see ROW_WORTH."""
        if len(self._known) < 2:
            return most
        return min(most, worth * max(0.0, self.growth(rows, 1) - 1.0) / max(1, rows - 1))

    def best_count(self, useful: Sequence[float]) -> int:
        """The number of rows that maximises useful rows per second. ``useful``: the rows' probabilities, in launch
        order. Of several equally good numbers the largest."""
        if not self._known or len(useful) < 2:
            return len(useful)
        rates = [total / seconds for total, seconds in zip(accumulate(useful), self._table(len(useful)), strict=False)]
        return len(rates) - rates[::-1].index(max(rates))
