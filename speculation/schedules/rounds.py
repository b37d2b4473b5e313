"""Synchronous speculation: draft, verify, wait, again. One run per trip through the pipeline.

The drafter works ``levels`` passes on a fresh tree below the last accepted token, evaluating all leaves of a level at
once; the best ``rows`` nodes, the root among them, are verified in one run; while they are, the drafter has nothing to
do. With ``width`` 1 that is chain speculation as every engine has it (Leviathan et al. 2023), else a tree of the best
nodes (SpecInfer, Miao et al. 2024, with the dynamic tree of later work).
"""

from __future__ import annotations

import enum

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
            now.tree.prune()  # nothing of it is in flight
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

    def defers_results(self, now: Situation) -> bool:
        """See Schedule."""
        return False
