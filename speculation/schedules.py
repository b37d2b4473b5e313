"""Every schedule by its name."""

from __future__ import annotations

from speculation.continuous import Continuous
from speculation.frontier import Frontier
from speculation.policy import Policy
from speculation.rounds import Rounds
from speculation.schedule import Schedule

_SCHEDULES: dict[str, type[Continuous] | type[Rounds] | type[Frontier]] = {
    "continuous": Continuous,
    "rounds": Rounds,
    "frontier": Frontier,
}


def make_schedule(policy: Policy) -> Schedule:
    """The schedule that ``policy`` names."""
    return _SCHEDULES[policy.schedule](policy)
