"""Whether many sequences run ahead of verification or are decoded in cohorts: which one earns more, measured.

    ratio = sum of the path probabilities of all rows that left / integral of V dt

V is what cohorts would earn at the moment (cohorts.py), so the ratio hardly depends on which sequences there are. The
sum is the number of tokens that are expected of those rows: it has much less noise than the tokens that came. Running
ahead comes first. Where its ratio is below PROMISE, cohorts are tried. Of two ways that were measured the better one
goes on, and the other one is tried again after ever more spells. Numbers of sequences between the same powers of two
share a record.
"""

from __future__ import annotations

from dataclasses import dataclass

SPELL, LEAST = 16, 96
"""A way is measured until so many tokens are expected of each sequence, and of all of them."""
SETTLES = 2
"""Roots of each sequence that leave before a spell of another way begins."""
PROMISE = 0.97
"""Cohorts that were not tried yet are expected to earn this share of V."""
STAKE = 2
"""A spell ends early where so many tokens of each sequence are missing from what the other way earned."""
PATIENCE, MOST_PATIENCE = 8, 64
"""Spells after which the other way is tried again: at first, and at most. They double each time."""


@dataclass(slots=True)
class _Record:
    in_cohorts: bool = False
    ahead: float | None = None  # the ratio of each way
    cohorts: float | None = None
    patience: int = PATIENCE
    left: int = PATIENCE  # spells before the other way is tried again


class Trial:
    """The record of each number of sequences, and the spell under way."""

    def __init__(self) -> None:
        self._records: dict[int, _Record] = {}
        self._record = _Record()
        self._unsettled = 0  # roots that have to leave before the spell begins
        self._expected = self._planned = 0.0
        self._last = 0.0

    @property
    def in_cohorts(self) -> bool:
        """Whether sequences are decoded in cohorts."""
        return self._record.in_cohorts

    @property
    def share(self) -> float:
        """What cohorts have been seen to earn of V; 1 before they are tried."""
        return 1.0 if self._record.cohorts is None else min(1.0, self._record.cohorts)

    def pause(self) -> None:
        """There are no several sequences any more."""
        self._record = _Record()

    def look(self, sequences: int, rate: float, now: float) -> None:
        """``sequences`` are decoded at ``now``, and cohorts would earn ``rate`` tokens per second."""
        record = self._records.setdefault(sequences.bit_length(), _Record())
        if record is not self._record:
            self._record = record
            self._begin(SETTLES * sequences)
        if self._unsettled <= 0:
            self._planned += rate * (now - self._last)
        self._last = now
        other = record.ahead if record.in_cohorts else record.cohorts
        is_lost = other is not None and self._expected < other * self._planned - STAKE * sequences
        if self._planned > 0 and (is_lost or self._expected >= max(LEAST, SPELL * sequences)):
            was_in_cohorts = record.in_cohorts
            _judge(record, self._expected / self._planned)
            self._begin(SETTLES * sequences if record.in_cohorts != was_in_cohorts else 0)

    def _begin(self, unsettled: int) -> None:
        self._unsettled, self._expected, self._planned = unsettled, 0.0, 0.0

    def launched(self, roots: int, expected: float) -> None:
        """A run left with ``roots`` roots; ``expected`` of its rows will be accepted."""
        if self._unsettled > 0:
            self._unsettled -= roots
        else:
            self._expected += expected


def _judge(record: _Record, ratio: float) -> None:
    """A spell has ended with ``ratio``: which way is next."""
    if record.in_cohorts:
        record.cohorts, other = ratio, record.ahead
    else:
        record.ahead, other = ratio, record.cohorts
    record.left -= 1
    is_worse = ratio < (PROMISE if other is None else other)
    is_due = other is not None and record.left <= 0
    if is_due and not is_worse:
        record.patience = min(MOST_PATIENCE, 2 * record.patience)
    if is_due or is_worse:
        record.in_cohorts, record.left = not record.in_cohorts, record.patience
