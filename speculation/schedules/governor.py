"""Never slower: how much to speculate, decided by what a token was measured to cost.

Theory of operation. Gears are ways to work, from plain decoding (gear 0) over chains of single rows to the widest
runs that the policy allows. Where ranks share cores, and runs in flight take each other's time, all of them are one run
at a time, and many runs in flight a gear of their own, the last, in which it does not begin. What counts is the
measured time per committed token; acceptance alone misleads, for rows may be free on one machine and dear on another. A
*spell* is some dozens of tokens in one gear. Now and then the governor probes a neighbour for one spell and stays there
if a token was cheaper by more than the noise (hysteresis); it gives up as soon as the probe has lost some tokens' time,
and probes a neighbour that disappointed half as often, up to a limit, because texts change.

Some things are known without probing. Where further rows cost little by the cost curve, a narrower gear has nothing to
offer: runs may have fewer rows in any gear, and have as many as are worth their time. Nor has one whose pass of r rows
takes longer than r tokens do at home. And plain decoding costs a trip through the pipeline for each token: while a
token takes clearly less than the quickest trip that was seen, plain decoding cannot be better.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from speculation.schedules.cost_curve import CostCurve

SPELL_TOKENS = 32
HYSTERESIS = 0.04
"""What a probed gear must be better by."""
DOUBT = 0.25
"""The same of many runs in flight against one, twice, where ranks share cores: it is seldom so."""
STAKE = 6
"""How many tokens' time a probe may lose before it is given up."""
SHORTER = 1.1
"""How many times longer a pass must take than that of a narrower gear, for that gear to be probed."""
MOST_SPELLS = 64
"""The longest wait for a second look at a gear that disappointed."""
TRIPS = 32


class Gear(NamedTuple):
    """``rows`` that a run may carry, 0 in plain decoding, and how many ``runs`` may be in flight, 0 for any number."""

    rows: int
    runs: int = 0

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.runs} run at a time" if self.runs else f"{self.rows} rows"


@dataclass(slots=True)
class _Patience:
    """When a gear may be probed again."""

    spells: int = 2
    left: int = 2
    was_better: bool = False  # at the last look, which was not believed yet


class Governor:
    """Chooses among gears of up to ``most_rows`` rows; ``is_oversubscribed``: ranks share cores."""

    def __init__(self, most_rows: int, is_oversubscribed: bool = False) -> None:
        doubled = (1 << power for power in range(most_rows.bit_length()) if 1 << power < most_rows)
        self.gears = [Gear(rows, runs=int(is_oversubscribed)) for rows in (0, *doubled, most_rows)]
        self._widest = len(self.gears) - 1
        if is_oversubscribed:
            self.gears.append(Gear(most_rows))
        self.curve = CostCurve()
        self._home = self._widest  # within it the cost curve says how many rows go
        self._probe: int | None = None
        self._home_s = 0.0  # seconds per token at home
        self._patience = [_Patience() for _ in self.gears]
        self._trips: deque[float] = deque(maxlen=TRIPS)
        self._since: float | None = None  # when the spell began; None while what older gears sent is on its way
        self._settled_at: float | None = None
        self._tokens = 0

    @property
    def gear(self) -> Gear:
        """The gear in force."""
        return self.gears[self._home if self._probe is None else self._probe]

    def opened(self) -> None:
        """A new request: the time before its first token belongs to nobody."""
        self._since = self._settled_at = None

    def returned(self, rows: int, slowest_s: float | None, trip_s: float, carries_root: bool) -> None:
        """A run came back ``trip_s`` after it left; the slowest stage had worked on all of it for ``slowest_s``."""
        if slowest_s is not None:
            self.curve.observe(rows, slowest_s)
        if carries_root:
            self._trips.append(trip_s / max(1.0, self.curve.growth(rows, 1)))

    def accepted(self, tokens: int, now: float) -> str:
        """So many tokens were committed at ``now``. Returns what was decided, in words, if anything was."""
        if self._since is None:
            # A spell begins when what the last gear sent is back: one trip later.
            if self._settled_at is None:
                self._settled_at = now + (min(self._trips) if self._trips else 0.0)
            if now >= self._settled_at:
                self._since, self._tokens = now, 0
            return ""
        self._tokens += tokens
        spent_s = now - self._since
        if self._tokens < SPELL_TOKENS and (self._probe is None or spent_s < (self._tokens + STAKE) * self._home_s):
            return ""
        return self._judge(spent_s / self._tokens, now)

    def _judge(self, token_s: float, now: float) -> str:
        """A spell is over, in which a token took ``token_s``."""
        if self._probe is None:
            self._home_s = token_s if not self._home_s else self._home_s + 0.5 * (token_s - self._home_s)
            for patience in self._patience:
                patience.left -= 1
            self._since, self._tokens = now, 0
            probe = next((index for index in self._worth_probing() if self._patience[index].left <= 0), None)
            if probe is None:
                return ""
            self._probe, self._since, self._settled_at = probe, None, None
            home = f"{1e3 * self._home_s:.3f} ms per token with {self.gears[self._home]}"
            return f"probe {self.gears[probe]}: {home}"
        probe, self._probe = self._probe, None
        patience, is_doubtful = self._patience[probe], probe > self._widest
        found, known = f"{1e3 * token_s:.3f} ms per token", f"{1e3 * self._home_s:.3f}"
        if token_s >= (1.0 - (DOUBT if is_doubtful else HYSTERESIS)) * self._home_s:
            patience.spells = min(MOST_SPELLS, 2 * patience.spells)
            patience.left, patience.was_better = patience.spells, False
            return self._shift_home(self._home, now, f"{found}, not better than {known}")
        if is_doubtful and not patience.was_better:
            patience.left, patience.was_better = 1, True
            return self._shift_home(self._home, now, f"{found} instead of {known}, to be seen again")
        self._patience[probe] = _Patience()
        self._patience[self._home] = _Patience() if is_doubtful else _Patience(8, 8)
        self._home_s = token_s
        return self._shift_home(probe, now, f"{found} instead of {known}")

    def _worth_probing(self) -> list[int]:
        """The neighbours of home that might be better, plain decoding last."""
        here, found = self._home, list[int]()
        if not 0 < here <= self._widest:  # plain decoding, or many runs where ranks share cores
            found.append(self._widest)
        elif here + 1 < len(self.gears):
            found.append(here + 1)
        narrower = [index for index in range(1, here) if self._saves(index)]
        found += narrower[-1:]
        if here > 0 and self._trips and self._home_s > (1.0 - HYSTERESIS) * min(self._trips):
            found.append(0)
        return found

    def _saves(self, gear: int) -> bool:
        """Whether a pass in the narrower ``gear`` is clearly shorter, and commits enough if all its rows are right."""
        rows = self.gears[gear].rows
        if not self.curve.knows(rows) or self.curve.seconds(rows) > rows * self._home_s:
            return False
        return self.curve.growth(self.gears[self._home].rows, rows) > SHORTER

    def _shift_home(self, gear: int, now: float, why: str) -> str:
        self._home, self._since, self._settled_at, self._tokens = gear, None, None, 0
        return f"{self.gears[gear]}: {why}"
