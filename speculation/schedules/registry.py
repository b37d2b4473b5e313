"""Schedules by name."""

from __future__ import annotations

from speculation.schedules.continuous import Continuous
from speculation.schedules.pipeinfer import PipeInfer
from speculation.schedules.policy import Policy
from speculation.schedules.rounds import Rounds
from speculation.schedules.schedule import Placement, Schedule


def make_schedule(policy: Policy, placement: Placement = "spread") -> Schedule:
    """The schedule that ``policy`` names, for roles with this ``placement``."""
    if policy.schedule == "rounds":
        return Rounds(policy)
    if policy.schedule == "pipeinfer":
        return PipeInfer(policy)
    return Continuous(policy, placement)
