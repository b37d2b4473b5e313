"""The prospect of speculation: how much faster than plain decoding it can be, by what passes are known to take.

    one pass at a time     E(k) T(1) / (k d + T(k + 1)),  the best k,  E(k) = 1 + g + ... + g^k
    many runs in flight    n T(1) / (T(r) + (n - 1) max(t(r) / r, d)),  the best r,  n = 1 / (1 - g)

T(r) is the time of r rows through all stages, t(r) that of the slowest stage, d that of a draft pass, and g the
probability that a draft's first choice is right. Where every stage has cores of its own, the draft costs nothing in the
first formula, and both are possible. The prospect is for a good draft: where even that does not pay, decoding starts
plain, and the governor tries speculation later.
"""

from __future__ import annotations

from speculation.schedules.cost_curve import CostCurve, Priors
from speculation.schedules.schedule import Placement

LONGEST = 16
"""Most tokens of a chain, and rows of a run, that are looked at."""


def prospect(priors: Priors, placement: Placement, right: float, most_rows: int) -> float:
    """The speed of speculation / that of plain decoding, at best, where a first choice is ``right`` so often."""
    trips, stages, drafts = CostCurve(priors.trips), CostCurve(priors.rows), CostCurve(priors.drafts)
    plain_s, draft_s, best = trips.seconds(1), drafts.seconds(1), 1.0
    has_cores = placement == "spread"
    tokens = 1.0
    for length in range(1, min(most_rows, LONGEST + 1)):
        tokens += right**length
        spent_s = trips.seconds(length + 1) + (0.0 if has_cores else length * draft_s)
        best = max(best, tokens * plain_s / spent_s)
    if has_cores:
        tokens = 1 / (1 - right)
        for rows in range(1, min(most_rows, LONGEST) + 1):
            spent_s = trips.seconds(rows) + (tokens - 1) * max(stages.seconds(rows) / rows, draft_s)
            best = max(best, tokens * plain_s / spent_s)
    return best
