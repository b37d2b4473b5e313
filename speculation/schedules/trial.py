"""Whether many sequences run ahead of verification or are decoded in cohorts: what earns more beside a common measure.

    ratio = sum of the path probabilities of all rows that left / integral of V      V: what cohorts earn, see cohorts.py

The sum counts the tokens that are expected of the rows. It has much less noise than the tokens that came, and it does
not depend on which sequences there were, as V does not. Running ahead comes first. Where it earned less than V,
cohorts are tried; of two that were measured the better one goes on, and the other one is tried again after a while.
Numbers of sequences of the same power of two have a record of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

SPELL, LEAST = 12, 96
"""Tokens of a sequence, and of all sequences, that are expected of what left in a spell, at least."""
PATIENCE, MOST_PATIENCE = 8, 64
"""Spells after which the other way is tried again; twice as many each time that it was not better."""


@dataclass(slots=True)
class _Record:
    in_cohorts: bool = False
    ahead: float | None = None  # the ratios
    cohorts: float | None = None
    patience: int = PATIENCE
    left: int = 0  # spells before the other way is tried again


class Trial:
    """The record of each number of sequences, and the spell under way."""

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}
        self._record = _Record()
        self._skipped = 0  # roots that have to leave before the spell begins
        self._expected = self._planned = 0.0
        self._last = 0.0

    @property
    def in_cohorts(self) -> bool:
        """Whether sequences are decoded in cohorts."""
        return self._record.in_cohorts

    def look(self, sequences: int, rate: float, now: float) -> None:
        """``sequences`` are decoded at ``now``, and cohorts would earn ``rate``."""
        record = self._records.setdefault(sequences.bit_length(), _Record())
        if record is not self._record:
            self._record = record
            self._begin(sequences)
        self._planned += rate * (now - self._last)
        self._last = now
        if self._expected >= max(LEAST, SPELL * sequences) and self._planned > 0:
            was_in_cohorts = record.in_cohorts
            self._judge(record, self._expected / self._planned)
            self._begin(sequences if record.in_cohorts != was_in_cohorts else 0)

    def _begin(self, skipped: int) -> None:
        self._skipped, self._expected, self._planned = skipped, 0.0, 0.0

    def launched(self, roots: int, expected: float) -> None:
        """A run left with ``roots`` roots; ``expected`` of its rows are accepted."""
        if self._skipped > 0:
            self._skipped -= roots
            self._planned = 0.0
        else:
            self._expected += expected

    def _judge(self, record: _Record, ratio: float) -> None:
        record.left -= 1
        if record.in_cohorts:
            record.cohorts, other = ratio, record.ahead
        else:
            record.ahead, other = ratio, record.cohorts
        is_worse = ratio < (1.0 if other is None else other)
        if is_worse or (record.left <= 0 and other is not None):
            record.patience = record.patience if is_worse else min(MOST_PATIENCE, 2 * record.patience)
            record.in_cohorts, record.left = not record.in_cohorts, record.patience
