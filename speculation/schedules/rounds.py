"""Synchronous speculation: draft, verify, wait for the result, repeat. One run per pipeline trip.

    time of a round = num_steps * (time of a draft pass) + (time of a pipeline trip)

The drafter makes ``num_steps`` passes on a new tree below the last accepted token, and evaluates up to ``draft_batch``
leaves per pass. The best ``max_rows`` nodes, the root among them, are verified in one run. The drafter idles meanwhile.
With ``topk`` = 1 the schedule is chain speculation (Leviathan et al. 2023), otherwise speculation with a dynamic tree
of the most probable nodes (SpecInfer, Miao et al. 2024; EAGLE-2, Li et al. 2024).

From ``speculate_below`` requests on rounds have no drafts. With ``most_drafted`` a run has that many drafted nodes, the
most probable ones of all its requests (TETRIS, Wu et al. 2025).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from pipeinfer.core.messages import MAX_ROWS
from speculation.schedules.continuous import choose_rows
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import ANY, Launch, Order, Situation, Step
from speculation.trees.forest import take_best
from speculation.trees.tree import Node, Tree


class _Phase(enum.Enum):
    VERIFYING = enum.auto()  # the prompt, or a round
    TURNING = enum.auto()  # a new root
    DRAFTING = enum.auto()
    READY = enum.auto()


class Rounds:
    """One round after another for each sequence; see Schedule. Sequences that are ready at the same time share a run,
    at most ceil(sequences / stages) of them, so that cohorts spread over the pipeline."""

    guesses = True
    most_sequences = ANY

    def __init__(self, policy: Policy, stages: int = 1) -> None:
        self._policy = policy
        self._stages = stages
        self._phases: dict[int, _Phase] = {}  # by sequence; who became ready first stands first

    def opened(self, tree: Tree) -> None:
        """See Schedule."""
        self._phases[tree.sequence] = _Phase.VERIFYING

    def closed(self, tree: Tree) -> None:
        """See Schedule."""
        del self._phases[tree.sequence]

    def next(self, now: Situation) -> Step | None:
        """See Schedule."""
        for tree in now.trees:
            if self._phases[tree.sequence] is _Phase.TURNING:
                if 0 < self._policy.speculate_below <= len(now.trees):
                    self._is_ready(tree)
                    continue
                self._phases[tree.sequence] = _Phase.DRAFTING
                tree.prune()  # none of its nodes is in flight
                return Order(self._policy.num_steps, restart=True, sequence=tree.sequence)
        trees = {tree.sequence: tree for tree in now.trees}
        ready = [trees[one] for one, phase in self._phases.items() if phase is _Phase.READY and one in trees]
        if not ready or now.slots <= 0 or (len(now.trees) > 1 and now.credits <= 0):
            return None
        nodes, room, most = list[Node](), now.room, now.root_room
        if self._policy.balance:
            most = min(most, -(-len(now.trees) // self._stages))
        del ready[most:]
        self._phases |= {tree.sequence: _Phase.VERIFYING for tree in ready}
        if self._policy.most_drafted:
            rows = min(MAX_ROWS, len(ready) + self._policy.most_drafted)
            nodes = take_best(ready, rows, len(ready), room, self._policy.min_path_prob)
            return Launch(nodes) if nodes else None
        for tree in ready:
            mine = choose_rows(tree, self._policy, room)
            room -= len(mine) - 1
            nodes += mine
        return Launch(nodes) if nodes else None

    def drafted(self, tree: Tree, nodes: list[Node]) -> None:
        """See Schedule."""
        if self._phases.get(tree.sequence) is _Phase.DRAFTING:
            self._is_ready(tree)

    def _is_ready(self, tree: Tree) -> None:
        del self._phases[tree.sequence]
        self._phases[tree.sequence] = _Phase.READY  # behind those that wait already

    def computed(self, rows: int, seconds: float) -> None:
        """See Schedule."""

    def returned(self, rows: int, slowest_s: float | None, trip_s: float, carries_root: bool) -> None:
        """See Schedule."""

    def accepted(self, tree: Tree, tokens: int, now: float) -> str:
        """See Schedule."""
        self._phases[tree.sequence] = _Phase.TURNING
        return ""

    def restarts(self, accepted: Sequence[Node]) -> bool:
        """See Schedule: its orders say so."""
        return False

    def defers_results(self, now: Situation) -> bool:
        """See Schedule."""
        return False
