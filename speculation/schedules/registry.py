"""Schedules by name."""

from __future__ import annotations

from speculation.schedules.continuous import RIGHT, Continuous
from speculation.schedules.cost_curve import NO_PRIORS, Priors
from speculation.schedules.pipeinfer import PipeInfer
from speculation.schedules.policy import Policy
from speculation.schedules.rounds import Rounds
from speculation.schedules.schedule import Placement, Schedule


def make_schedule(
    policy: Policy,
    placement: Placement = "spread",
    priors: Priors = NO_PRIORS,
    right: float = RIGHT,
    stages: int = 1,
) -> Schedule:
    """The schedule that ``policy`` names, for roles with this ``placement``; ``priors``: what passes
    take, ``right``: how often a draft's first choice is thought to be right."""
    if policy.schedule == "rounds":
        return Rounds(policy, stages)
    if policy.schedule == "pipeinfer":
        return PipeInfer(policy)
    return Continuous(policy, placement, priors, right, stages)
