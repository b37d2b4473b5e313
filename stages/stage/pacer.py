"""When to ask for the next run: late enough that the choice is fresh, early enough that the stage never idles.

The first stage learns how long a pass of so many rows takes, how long the orchestrator's answer to a credit takes, and
how late it is woken (a layer in progress is not interrupted). All times in seconds on the machine's own clock.
"""

from __future__ import annotations

WEIGHT = 0.25
"""How much one measurement counts against those before it."""
SAFETY = 1.25
"""The answer is given a little more time than it was seen to take."""


class Pacer:
    """Computes when, during a pass, the credit for the next run is due."""

    def __init__(self) -> None:
        self._pass_s: dict[int, float] = {}  # by rows
        self._answer_s: float | None = None
        self._late_s = 0.0
        self._rows = 0
        self._due: float | None = None
        self._credited_at: float | None = None

    def begin(self, now: float, rows: int) -> float | None:
        """A pass of ``rows`` rows begins: when the credit is due, or None for at once."""
        self._rows, self._due = rows, None
        if rows in self._pass_s and self._answer_s is not None:
            due = now + self._pass_s[rows] - SAFETY * self._answer_s - self._late_s
            self._due = due if due > now else None
        return self._due

    def end(self, seconds: float, is_abandoned: bool) -> None:
        """The pass has taken ``seconds``; one that was abandoned teaches nothing."""
        if not is_abandoned:
            self._pass_s[self._rows] = _blend(self._pass_s.get(self._rows), seconds)

    def woke(self, now: float) -> None:
        """The alarm for the credit rang."""
        if self._due is not None:
            self._late_s = _blend(self._late_s, max(0.0, now - self._due))

    def credited(self, now: float) -> None:
        """A credit leaves."""
        self._credited_at = now

    def arrived(self, now: float) -> None:
        """A run is here. The quickest answers measure the round trip; slow ones include waiting for rows to send."""
        if self._credited_at is not None:
            answer_s, self._credited_at = now - self._credited_at, None
            if self._answer_s is None or answer_s < self._answer_s:
                self._answer_s = answer_s
            else:
                self._answer_s = min(answer_s, 1.02 * self._answer_s)


def _blend(known: float | None, measured: float) -> float:
    return measured if known is None else known + WEIGHT * (measured - known)
