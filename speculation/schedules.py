"""Every schedule by its name."""

from __future__ import annotations

from speculation.continuous import Continuous
from speculation.frontier import Frontier
from speculation.policy import Policy
from speculation.rounds import Rounds
from speculation.schedule import Placement, Schedule


def make_schedule(policy: Policy, placement: Placement = "spread") -> Schedule:
    """The schedule that ``policy`` names, for roles that are placed so."""
    if policy.schedule == "rounds":
        return Rounds(policy)
    if policy.schedule == "frontier":
        return Frontier(policy)
    return Continuous(policy, placement)
