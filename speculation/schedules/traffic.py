"""What many sequences earn and what their runs take, measured while they are decoded.

    G      tokens per second of all sequences; mu = G / A: what a second of one of A sequences earns
    c      mean seconds of a stage for a run with roots
    eta    such runs per second
    sigma  share of the time that the first stage computes them, eta c
    k, m   mean roots of such a run, and mean rows of it per root
    wait   mean seconds that a root waits for drafts before it leaves

Sums over the past fade by exp(-1 / (SPAN A)) per token. A run counts when it leaves, with what the latency model
expects of it.
"""

from __future__ import annotations

import math

SPAN = 30
"""Tokens of a sequence after which a measurement has faded to 1 / e."""
FIRST = 2
"""Tokens of a sequence that what is expected before anything is measured weighs as much as."""
BUSIEST = 0.98
"""The most that counts as sigma."""


class Traffic:
    """The sums. ``began_at``: when measuring began. At first plain decoding of ``sequences`` sequences is expected,
    with runs of ``roots`` roots that take ``run_s`` at each of ``stages`` stages."""

    def __init__(self, began_at: float, sequences: int, stages: int, roots: int, run_s: float) -> None:
        self._tokens = self._roots = self._rows = float(FIRST * sequences)
        self._seconds = FIRST * stages * run_s
        self._runs = self._tokens / roots
        self._run_s = self._runs * run_s
        self._wait_s = 0.0
        self._last = began_at

    def accepted(self, tokens: int, sequences: int, now: float) -> None:
        """``tokens`` tokens were emitted."""
        fade = math.exp(-tokens / (SPAN * sequences))
        self._tokens = fade * self._tokens + tokens
        self._seconds = fade * self._seconds + now - self._last
        self._last = now
        self._runs *= fade
        self._run_s *= fade
        self._roots *= fade
        self._rows *= fade
        self._wait_s *= fade

    def launched(self, roots: int, rows: int, run_s: float, wait_s: float) -> None:
        """A run left with ``roots`` roots, which had waited for drafts ``wait_s`` in all, and ``rows`` rows of their
        trees; a stage takes ``run_s`` for it."""
        self._runs += 1
        self._roots += roots
        self._rows += rows
        self._run_s += run_s
        self._wait_s += wait_s

    @property
    def rate(self) -> float:
        """G."""
        return self._tokens / self._seconds

    @property
    def runs_per_s(self) -> float:
        """eta."""
        return self._runs / self._seconds

    @property
    def busy(self) -> float:
        """sigma."""
        return min(BUSIEST, self._run_s / self._seconds)

    @property
    def run_s(self) -> float:
        """c."""
        return self._run_s / self._runs

    @property
    def roots(self) -> float:
        """k."""
        return self._roots / self._runs

    @property
    def rows_per_root(self) -> float:
        """m."""
        return self._rows / self._roots

    @property
    def wait_s(self) -> float:
        """wait."""
        return self._wait_s / self._roots
