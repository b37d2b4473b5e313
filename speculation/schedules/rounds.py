"""Synchronous speculation: draft, verify, wait for the result, repeat. One run per pipeline trip.

    time of a round = num_steps * (time of a draft pass) + (time of a pipeline trip)

The drafter makes ``num_steps`` passes on a new tree below the last accepted token, and evaluates up to ``draft_batch``
leaves per pass. The best ``max_rows`` nodes, the root among them, are verified in one run. The drafter idles meanwhile.
With ``topk`` = 1 the schedule is chain speculation (Leviathan et al. 2023), otherwise speculation with a dynamic tree
of the most probable nodes (SpecInfer, Miao et al. 2024; EAGLE-2, Li et al. 2024).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from speculation.schedules.continuous import choose_rows
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import Launch, Order, Situation, Step
from speculation.trees.tree import Node


class _Phase(enum.Enum):
    VERIFYING = enum.auto()  # the prompt, or a round
    TURNING = enum.auto()  # a new root
    DRAFTING = enum.auto()
    READY = enum.auto()


class Rounds:
    """One round after another; see Schedule."""

    guesses = True

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._phase = _Phase.VERIFYING

    def opened(self) -> None:
        """See Schedule."""
        self._phase = _Phase.VERIFYING

    def next(self, now: Situation) -> Step | None:
        """See Schedule."""
        if self._phase is _Phase.TURNING:
            self._phase = _Phase.DRAFTING
            now.tree.prune()  # none of its nodes is in flight
            return Order(self._policy.num_steps, restart=True)
        if self._phase is _Phase.READY and now.slots > 0:
            self._phase = _Phase.VERIFYING
            return Launch(choose_rows(now.tree, self._policy, now.room))
        return None

    def drafted(self, nodes: list[Node]) -> None:
        """See Schedule."""
        if self._phase is _Phase.DRAFTING:
            self._phase = _Phase.READY

    def computed(self, rows: int, seconds: float) -> None:
        """See Schedule."""

    def returned(self, rows: int, slowest_s: float | None, trip_s: float, carries_root: bool) -> None:
        """See Schedule."""

    def accepted(self, tokens: int, now: float) -> str:
        """See Schedule."""
        self._phase = _Phase.TURNING
        return ""

    def restarts(self, accepted: Sequence[Node]) -> bool:
        """See Schedule: its orders say so."""
        return False

    def defers_results(self, now: Situation) -> bool:
        """See Schedule."""
        return False
