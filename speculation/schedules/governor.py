"""The governor: picks the gear with the least measured time per committed token.

    keep a probed gear if    t_probe < (1 - HYSTERESIS) t_home
    t                        seconds per committed token over a spell of at least SPELL_TOKENS tokens

Gears. Gear 0 is plain decoding. Further gears allow 1, 2, 4, ... rows per run, up to the policy's ``max_rows``. The
governor starts in the gear with ``max_rows`` (*home*). If ranks share cores, concurrent runs slow each other down;
these gears then have one run in flight, and one further gear has many. The time per token decides because acceptance
alone misleads: rows may be free on one machine and expensive on another.

Probing. From time to time the governor probes a neighbour of home for one spell. The neighbour becomes home if the
inequality holds. A probe ends early if it has lost the time of STAKE tokens. A neighbour that was not better is probed
half as often each time, with a limit, because texts change.

Gears that are not probed:
- A narrower gear of r rows, unless T(rows of home) > SHORTER T(r), and T(r) is at most the time of r tokens at home (T:
  see cost_curve.py).
- Plain decoding, unless t_home > (1 - HYSTERESIS) times the quickest trip through the pipeline, because plain decoding
  needs one trip per token.

Where priors say what passes take, home is plain decoding at first, with a predicted time per token: the quickest trip,
but not less than the prior. The first spell is a probe of the widest gear. If speculation has no prospect (prospect.py)
there is no such probe, and the first one comes late. Three more rules keep a bad draft from costing much:
- A probe of or from plain decoding has a smaller stake, and after a failure of the latter the next one comes later.
- PLAIN_HYSTERESIS takes the place of HYSTERESIS for plain decoding, and NEAR in the condition for its probe.
- Plain decoding is probed before all other gears if a token at home takes longer than the quickest trip.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from speculation.schedules.cost_curve import CostCurve, Costs

SPELL_TOKENS = 32
"""Tokens of a spell."""
HYSTERESIS = 0.04
"""A probed gear must take this part less time per token."""
PLAIN_HYSTERESIS = 0.015
"""The same for plain decoding, where priors are known."""
NEAR = 0.25
"""Where priors are known, plain decoding is probed if it may be slower by this part: one row is rarely seen alone while
speculation goes on, and its prior may be too high."""
DOUBT = 0.25
"""The same for many runs in flight against one where ranks share cores; two probes in a row must show it."""
STAKE = 6
"""A probe ends early if it has lost the time of so many tokens."""
SMALL_STAKE, LATER = 3, 4
"""Where priors are known, the same for a probe from plain decoding, and how many times as late the next one is."""
SHORTER = 1.1
"""A pass at home must take this multiple of a narrower gear's pass for that gear to be probed."""
MOST_SPELLS = 64
"""The most spells between two probes of a gear."""
LATE = 8
"""Spells before the first probe of speculation that has no prospect."""
TRIPS = 32
"""Pipeline trips that are remembered."""


class Gear(NamedTuple):
    """``rows`` that a run may have (0: plain decoding), and ``runs`` that may be in flight (0: any number)."""

    rows: int
    runs: int = 0

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.runs} run at a time" if self.runs else f"{self.rows} rows"


@dataclass(slots=True)
class _Patience:
    """When a gear may be probed again."""

    spells: int = 2
    left: int = 2
    was_better: bool = False  # in the last probe; one more must confirm it


class Governor:
    """Chooses among gears of up to ``most_rows`` rows; ``is_oversubscribed``: ranks share cores. ``prior``: what passes
    of the slowest stage are known to take, ``plain_s``: seconds of a token of plain decoding by what is known, 0 if
    nothing is. ``pays``: whether speculation may be faster."""

    def __init__(
        self,
        most_rows: int,
        is_oversubscribed: bool = False,
        prior: Costs = (),
        plain_s: float = 0.0,
        pays: bool = True,
    ) -> None:
        doubled = (1 << power for power in range(most_rows.bit_length()) if 1 << power < most_rows)
        self.gears = [Gear(rows, runs=int(is_oversubscribed)) for rows in (0, *doubled, most_rows)]
        self._widest = len(self.gears) - 1
        if is_oversubscribed:
            self.gears.append(Gear(most_rows))
        self.curve = CostCurve(prior)
        self._plain_s, self._is_informed = plain_s, plain_s > 0
        self._home = 0 if self._is_informed else self._widest  # within a gear the cost curve picks the number of rows
        self._plain_hysteresis = PLAIN_HYSTERESIS if self._is_informed else HYSTERESIS
        self._near = NEAR if self._is_informed else HYSTERESIS
        self._is_predicted = self._is_informed and pays  # whether the time at home is none that was measured
        self._probe = self._widest if self._is_predicted else None
        self._home_s = plain_s if self._is_predicted else 0.0  # seconds per token at home
        self._patience = [_Patience() if pays else _Patience(LATE, LATE) for _ in self.gears]
        self._trips: deque[float] = deque(maxlen=TRIPS)
        self._since: float | None = None  # when the spell began; None while runs of older gears are in flight
        self._settled_at: float | None = None
        self._tokens = 0

    @property
    def gear(self) -> Gear:
        """The gear in force."""
        return self.gears[self._home if self._probe is None else self._probe]

    def opened(self) -> None:
        """A new request begins; the time before its first token counts for no gear."""
        self._since = self._settled_at = None

    def returned(self, rows: int, slowest_s: float | None, trip_s: float, carries_root: bool) -> None:
        """A run returned ``trip_s`` after its launch; the slowest stage computed all of its rows in ``slowest_s``."""
        if slowest_s is not None:
            self.curve.observe(rows, slowest_s)
        if carries_root:
            self._trips.append(trip_s / max(1.0, self.curve.growth(rows, 1)))

    def accepted(self, tokens: int, now: float) -> str:
        """``tokens`` tokens were committed at ``now``. Returns the decision as text; "" for none."""
        if self._since is None:
            # A spell begins when the runs of the last gear have returned: one trip later.
            if self._settled_at is None:
                self._settled_at = now + (min(self._trips) if self._trips else 0.0)
            if now >= self._settled_at:
                self._since, self._tokens = now, 0
            return ""
        self._tokens += tokens
        spent_s = now - self._since
        if self._is_predicted and self._trips:
            self._home_s = max(self._plain_s, min(self._trips))
        stake = SMALL_STAKE if self._is_informed and 0 in (self._home, self._probe) else STAKE
        if self._tokens < SPELL_TOKENS and (self._probe is None or spent_s < (self._tokens + stake) * self._home_s):
            return ""
        return self._judge(spent_s / self._tokens, now)

    def _judge(self, token_s: float, now: float) -> str:
        """End a spell in which a token took ``token_s``."""
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
        gain = DOUBT if is_doubtful else HYSTERESIS if probe else self._plain_hysteresis
        was_predicted, self._is_predicted = self._is_predicted, False
        if token_s >= (1.0 - gain) * self._home_s:
            if not was_predicted:
                times = LATER if self._is_informed and self._home == 0 else 2
                patience.spells = min(MOST_SPELLS, times * patience.spells)
            self._home_s = 0.0 if was_predicted else self._home_s
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
        """The neighbours of home that may be better, plain decoding last."""
        here, found = self._home, list[int]()
        if not 0 < here <= self._widest:  # plain decoding, or many runs where ranks share cores
            found.append(self._widest)
        elif here + 1 < len(self.gears):
            found.append(here + 1)
        narrower = [index for index in range(1, here) if self._saves(index)]
        found += narrower[-1:]
        if here > 0 and self._trips and self._home_s > (1.0 - self._near) * min(self._trips):
            is_first = self._is_informed and self._home_s > min(self._trips)
            found.insert(0 if is_first else len(found), 0)
        return found

    def _saves(self, gear: int) -> bool:
        """Whether a pass in the narrower ``gear`` is clearly shorter, and fast enough if all its rows are accepted."""
        rows = self.gears[gear].rows
        if not self.curve.knows(rows) or self.curve.seconds(rows) > rows * self._home_s:
            return False
        return self.curve.growth(self.gears[self._home].rows, rows) > SHORTER

    def _shift_home(self, gear: int, now: float, why: str) -> str:
        self._home, self._since, self._settled_at, self._tokens = gear, None, None, 0
        return f"{self.gears[gear]}: {why}"
