"""Calibration: from what a draft claims to how often it is right.

A draft says log p for its k-th choice after a node. Which rows are worth their cost depends on q, the probability that
the target's token is that choice, and the two differ: drafts are too sure of themselves or not sure enough, and
emulated ones claim anything. The map is Platt's (Platt 1999, "Probabilistic outputs for support vector machines and
comparisons to regularized likelihood methods"), one sigmoid per rank with a common slope:

    logit(q) = offset[k] + slope * logit(p)

The slope is an inverse temperature (Guo et al. 2017, "On calibration of modern neural networks", arXiv:1706.04599), the
offsets are the rank curve. Both are fitted to the latest verified outcomes by Newton's method (iteratively reweighted
least squares) under a Gaussian prior around the identity: little evidence changes little, and where the claims never
vary, so that slope and offset cannot be told apart, it settles for the smallest change that explains the outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from math import exp, expm1, log1p
from typing import Any, NamedTuple

import numpy as np

from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import Calibrate

RANKS = 8
"""Ranks that are told apart, unless said otherwise."""
WINDOW = 256
"""Outcomes that are remembered, the latest ones."""
REFIT_EVERY = 8
"""Outcomes between refits. A refit is one Newton step: a handful of them converges, and none takes long."""
MOST = 0.999
"""No guess is more certain than this."""
LEAST_LOGP = -20.0
"""No guess is less probable than e to this."""
OFFSET_PRIOR, SLOPE_PRIOR = 1.0, 8.0
"""Precisions of the prior: offsets are 0 within 1, the slope is 1 within 0.35."""

_MOST_LOGP = math.log(MOST)
_EXTREME = 10.0  # logits beyond it count as this much: 0.00005 and 0.99995
_SURE, _HOPELESS = -math.log1p(math.exp(-_EXTREME)), -math.log1p(math.exp(_EXTREME))  # as log-probabilities
_LEAST_SLOPE, _MOST_SLOPE, _MOST_OFFSET = 0.05, 4.0, 12.0
_LONGEST_STEP = 3.0  # in logits: where a sigmoid is flat, Newton's method overshoots, and would swing for ever


class Calibration:
    """The map for one draft source whose choices have ``ranks`` ranks; what lies beyond counts as the last rank.

    The identity (within the bounds) until outcomes are observed. Memory: 24 * WINDOW * ranks bytes. ``revision`` grows
    with every refit; ``outcomes`` counts what was observed. Two are equal if their words are, whatever they remember.
    """

    def __init__(self, ranks: int = RANKS) -> None:
        if ranks < 1:
            raise ValueError(f"a draft has at least one rank, not {ranks}")
        self.ranks = ranks
        self._adopt(1.0, [0.0] * ranks)
        self.revision = 0
        self.outcomes = 0
        self._prior_slope, self._prior_offsets = self.slope, np.zeros(ranks)
        self._seen = np.zeros((3, WINDOW, ranks))  # claimed logits; hits; which ranks were named
        self._fresh = 0  # outcomes in the window, which restarts where words were loaded

    def _adopt(self, slope: float, offsets: list[float]) -> None:
        self.slope, self.offsets = slope, offsets
        self._against = [exp(-offset) for offset in offsets]  # what the odds against a claim are multiplied by

    def __repr__(self) -> str:
        offsets = ", ".join(f"{offset:.2f}" for offset in self.offsets)
        return f"Calibration(slope {self.slope:.2f}, offsets [{offsets}], revision {self.revision})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.to_words() == other.to_words()

    def logp(self, rank: int, claimed_logp: float) -> float:
        """Natural log of the probability that the choice of ``rank`` (0 is the first) is the target's token.

        It never falls as ``claimed_logp`` (natural log) grows, and lies between LEAST_LOGP and log(MOST). A claim that
        is no number counts as hopeless."""
        # Odds instead of logits, as every guess comes by here: (1 - q) / q = exp(-offset) * ((1 - p) / p) ** slope
        odds = expm1(-claimed_logp) if _HOPELESS < claimed_logp < _SURE else exp(-_logit(claimed_logp))
        logp = -log1p(self._against[rank if rank < self.ranks else -1] * odds**self.slope)
        return logp if LEAST_LOGP <= logp <= _MOST_LOGP else _within(logp, LEAST_LOGP, _MOST_LOGP)

    def observe(self, claimed: Sequence[float], hit: int | None) -> None:
        """Learn from one node whose following token the target has decided.

        ``claimed``: log-probabilities (natural log) of the choices that the draft named there, by rank; NaN where it
        named none. ``hit``: the rank that held the target's token, None if none did; IndexError if there is no such."""
        if hit is not None and not 0 <= hit < len(claimed):
            raise IndexError(f"rank {hit} of {len(claimed)} cannot have been right")
        self.learn((rank, logp, rank == hit) for rank, logp in enumerate(claimed))

    def learn(self, outcomes: Iterable[tuple[int, float, bool]]) -> None:
        """The same from (rank, claimed log-probability, whether it was right) of each choice, in any order. Ranks
        beyond the last and claims that are no numbers teach nothing."""
        claims, hits, named = [0.0] * self.ranks, [0.0] * self.ranks, [0.0] * self.ranks
        for rank, logp, hit in outcomes:
            if rank in range(self.ranks) and not math.isnan(logp):
                claims[rank], hits[rank], named[rank] = _logit(logp), float(hit), 1.0
        self._seen[:, self._fresh % WINDOW] = claims, hits, named
        self._fresh += 1
        self.outcomes += 1
        if self._fresh % REFIT_EVERY == 0:
            self._refit()

    def _refit(self) -> None:
        """One Newton step towards the maximum a posteriori. The Hessian is an arrow: a slope, and offsets that meet
        only through it, so the slope's step is solved first, with the offsets eliminated."""
        claims, hits, named = self._seen[:, : min(self._fresh, WINDOW)]
        offsets = np.array(self.offsets)
        q = 1.0 / (1.0 + np.exp(-(offsets + self.slope * claims)))
        surprise = (hits - q) * named
        weight = q * (1.0 - q) * named
        leverage = weight * claims
        uphill = surprise.sum(0) - OFFSET_PRIOR * (offsets - self._prior_offsets)
        uphill_slope = float((surprise * claims).sum()) - SLOPE_PRIOR * (self.slope - self._prior_slope)
        curvature = weight.sum(0) + OFFSET_PRIOR
        cross = leverage.sum(0)
        curvature_slope = float((leverage * claims).sum()) + SLOPE_PRIOR
        ratio = cross / curvature
        tilt = (uphill_slope - float(ratio @ uphill)) / (curvature_slope - float(ratio @ cross))
        tilt = _within(self.slope + tilt, _LEAST_SLOPE, _MOST_SLOPE) - self.slope  # else order would be lost
        shift = (uphill - cross * tilt) / curvature
        longest = float(np.abs(shift + tilt * claims).max())
        share = min(1.0, _LONGEST_STEP / longest) if longest > 0.0 else 1.0
        # In 32 bits, as they travel: numpy's sums and exponentials differ in the last bits from processor to processor,
        # and a trace from one must replay on another (invariant L9).
        slope = float(np.float32(_within(self.slope + share * tilt, _LEAST_SLOPE, _MOST_SLOPE)))
        offsets = np.clip(offsets + share * shift, -_MOST_OFFSET, _MOST_OFFSET)
        self._adopt(slope, offsets.astype(np.float32).tolist())
        self.revision += 1

    def to_words(self) -> dict[str, Any]:
        """The map as plain numbers (JSON can hold them): slope, offsets, revision, outcomes. Not what it remembers."""
        return {
            "slope": self.slope,
            "offsets": list(self.offsets),
            "revision": self.revision,
            "outcomes": self.outcomes,
        }

    def message(self) -> Calibrate:
        """As it travels to a drafter."""
        return Calibrate(self.revision & 0xFFFFFFFF, self.outcomes & 0xFFFFFFFF, self.slope, tuple(self.offsets))

    @classmethod
    def of(cls, message: Calibrate) -> Calibration:
        """What ``message`` says. RemoteProtocolError if it is nothing sound."""
        if not message.offsets:
            raise RemoteProtocolError(f"a calibration without ranks: {message}")
        try:
            return cls.from_words(message._asdict())
        except ValueError as error:
            raise RemoteProtocolError(str(error)) from error

    @classmethod
    def from_words(cls, words: Mapping[str, Any]) -> Calibration:
        """The map that ``to_words`` wrote. If it goes on learning, this is what its prior pulls it to. ValueError if
        something is missing or is not a number within the bounds."""
        try:
            offsets = [float(offset) for offset in words["offsets"]]
            slope, revision, outcomes = float(words["slope"]), int(words["revision"]), int(words["outcomes"])
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"these words describe no calibration: {error!r}") from error
        sound = all(abs(offset) <= _MOST_OFFSET for offset in offsets) and _LEAST_SLOPE <= slope <= _MOST_SLOPE
        if not sound or revision < 0 or outcomes < 0:
            raise ValueError(f"these words describe no calibration: {dict(words)}")
        made = cls(len(offsets))
        made._adopt(slope, offsets)
        made.revision, made.outcomes = revision, outcomes
        made._prior_slope, made._prior_offsets = slope, np.array(offsets)
        return made


class Bin(NamedTuple):
    """A row of a reliability table: mean of the claimed probabilities, share that came true, how many."""

    claimed: float
    observed: float
    events: int


class Reliability:
    """How far probabilities can be trusted: ``bins`` equal bins of [0, 1] (Guo et al. 2017, section 2)."""

    def __init__(self, bins: int = 10) -> None:
        if bins < 1:
            raise ValueError(f"a table has at least one bin, not {bins}")
        self._claimed = [0.0] * bins
        self._hits = [0] * bins
        self._counts = [0] * bins

    def add(self, probability: float, hit: bool) -> None:
        """Count an event that was said to have ``probability`` (ValueError outside [0, 1]) and came true or not."""
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"not a probability: {probability}")
        index = min(int(probability * len(self._counts)), len(self._counts) - 1)
        self._claimed[index] += probability
        self._hits[index] += hit
        self._counts[index] += 1

    def rows(self) -> list[Bin]:
        """The bins that hold something, the least probable first."""
        bins = zip(self._claimed, self._hits, self._counts, strict=True)
        return [Bin(claimed / count, hits / count, count) for claimed, hits, count in bins if count]

    def error(self) -> float:
        """The expected calibration error (ECE): |claimed - observed|, averaged over all events; 0 for none."""
        gaps = (abs(claimed - hits) for claimed, hits in zip(self._claimed, self._hits, strict=True))
        return sum(gaps) / max(1, sum(self._counts))


def _logit(logp: float) -> float:
    """log(p / (1 - p)) of p = exp(``logp``), within _EXTREME; NaN is the worst."""
    if logp >= _SURE:
        return _EXTREME
    return logp - math.log(-math.expm1(logp)) if logp > _HOPELESS else -_EXTREME


def _within(value: float, least: float, most: float) -> float:
    return min(most, max(least, value))
