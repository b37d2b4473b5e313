"""Synchronous cohorts: what many sequences earn in them at best, and the orders to drafters.

A root waits for L levels of drafts, leaves with n - 1 others, and nothing is drafted for its sequence until the result
is there. With T(r) of cost_curve.py, d(r) seconds of a draft pass of r rows, g the probability of a first choice, A
sequences and S stages:

    V = max over n, L of  E(L) max(F n, C A), L > 0 only where that is WORTH times as much
        F = 1 / max(t, (S t + w) / floor(A / n), w),  C = 1 / max(S t + w, t ceil(A / n), w ceil(A / n))
        t = T(n (L + 1)),  w = L d(n),  E(L) = 1 + g + ... + g^L

t is the time that the first stage needs for a run, and w the one that the draft needs. F is the rate of full runs: a
sequence comes by again after its drafts and S stages, and meanwhile floor(A / n) of them leave. C is the rate of turns
in which each sequence leaves once, and one run may have fewer roots. With L = 0 this is plain decoding, without orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from speculation.schedules.schedule import UNLIMITED, Order
from speculation.trees.tree import Node, Tree

PassTime = Callable[[int], float]
"""Seconds of a pass by its rows."""

MOST_LEVELS = 16
"""More levels are not considered."""
WORTH = 1.01
"""Drafts have to earn this multiple of what plain decoding earns."""
LATE = 4
"""An answer to an order is waited for until this multiple of the time that its passes take."""


class Plan(NamedTuple):
    """Cohorts of ``roots`` roots with ``levels`` levels below them earn ``rate`` tokens per second; the drafts of one
    take ``drafts_s``."""

    rate: float
    roots: int
    levels: int
    drafts_s: float


def plan(
    sequences: int, stages: int, right: float, guesses: int, run_s: PassTime, draft_s: PassTime
) -> Plan:
    """The best cohorts, with at most ``guesses`` guesses in a run. ``right``: g; ``run_s``, ``draft_s``: T and d."""
    plain = drafted = Plan(0.0, 1, 0, 0.0)
    for roots in range(1, -(-sequences // stages) + 1):
        tokens = 0.0
        for levels in range(min(MOST_LEVELS, guesses // roots) + 1):
            tokens += right**levels
            stage_s, drafts_s = run_s(roots * (levels + 1)), levels * draft_s(roots)
            trip_s, each_s, runs = stages * stage_s + drafts_s, max(stage_s, drafts_s), -(-sequences // roots)
            full = roots / max(each_s, trip_s / (sequences // roots))
            found = Plan(tokens * max(full, sequences / max(trip_s, each_s * runs)), roots, levels, drafts_s)
            if levels:
                drafted = max(drafted, found)
            else:
                plain = max(plain, found)
    return drafted if drafted.rate > WORTH * plain.rate else plain


class Orders:
    """What drafters have been told of each sequence: to draft without end, or so many levels for a root."""

    def __init__(self, draft_batch: int) -> None:
        self._draft_batch = draft_batch
        self._is_endless: dict[int, bool] = {}  # by sequence; those that have been told
        self._roots: dict[int, Node] = {}  # that levels were ordered for last
        self._queue: dict[int, Node] = {}  # roots that levels will be ordered for, in turn
        self._late_at: dict[int, float] = {}  # until when an answer is waited for, of those that are missing

    def closed(self, sequence: int) -> None:
        """``sequence`` is over."""
        for kept in (self._is_endless, self._roots, self._queue, self._late_at):
            kept.pop(sequence, None)

    def drafted(self, sequence: int) -> None:
        """An order of levels has been answered."""
        self._late_at.pop(sequence, None)

    @property
    def is_awaited(self) -> bool:
        """Whether an answer is missing."""
        return bool(self._late_at)

    def forget(self) -> None:
        """All sequences are told something else; answers that are missing will come."""
        for kept in (self._is_endless, self._roots, self._queue):
            kept.clear()

    def without_end(self, trees: Sequence[Tree]) -> Order | None:
        """The next order, if all sequences are to be drafted for always."""
        self._queue.clear()
        if len(self._is_endless) < len(trees) or not all(self._is_endless.values()):
            for tree in trees:
                if not self._is_endless.get(tree.sequence) and tree.sequence not in self._late_at:
                    self._is_endless[tree.sequence] = True
                    return Order(UNLIMITED, draft_batch=self._draft_batch, sequence=tree.sequence, shared=True)
        return None

    def of_levels(self, trees: Sequence[Tree], planned: Plan, now: float) -> Order | None:
        """The next order, if each unsent root is to have the levels of ``planned``. They are ordered for no more roots
        at once than a run has: the draft serves one cohort after the other, as a stage does."""
        under_way = sum(now < late_at for late_at in self._late_at.values())
        for tree in trees:
            sequence = tree.sequence
            if sequence in self._late_at:
                continue
            if not planned.levels or not tree.root.pending or self._roots.get(sequence) is tree.root:
                if self._is_endless.get(sequence, True):
                    self._is_endless[sequence] = False
                    return Order(0, sequence=sequence)
            elif self._queue.get(sequence) is not tree.root:
                self._queue.pop(sequence, None)
                self._queue[sequence] = tree.root
        roots = {tree.sequence: tree.root for tree in trees}
        for sequence in [*self._queue] if under_way < planned.roots else ():
            root = self._queue.pop(sequence)
            if roots.get(sequence) is not root or not root.pending:
                continue  # it has left without
            self._roots[sequence], self._is_endless[sequence] = root, False
            self._late_at[sequence] = now + LATE * planned.drafts_s
            return Order(planned.levels, draft_batch=1, sequence=sequence)
        return None

    def ready_at(self, tree: Tree, levels: int, now: float) -> float:
        """When the unsent root of ``tree`` waits for drafts no longer: in the past if it has its ``levels``."""
        if late_at := self._late_at.get(tree.sequence):
            return late_at
        return math.inf if levels and self._roots.get(tree.sequence) is not tree.root else now
