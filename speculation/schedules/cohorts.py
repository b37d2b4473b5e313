"""Synchronous cohorts: what many sequences would earn in them, and which are ready to leave.

A root waits until its tree has L levels, which the draft evaluates for no other sequence, and leaves with n - 1 others;
its tree grows no further until the result is there. With T(r) of cost_curve.py, d(r) seconds of a draft pass of r rows,
g the probability of a first choice, A sequences and S stages:

    V      most tokens per second, over n and L, of  n E(L) / max(t, (S t + w) / floor(A / n), w)
           t = T(n (L + 1)), w = L d(n), E(L) = 1 + g + ... + g^L

The first stage makes a run in t. floor(A / n) runs share what a sequence waits for in a turn: its drafts and S stages.
The draft makes the drafts of a run in w. With L = 0 this is plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from speculation.schedules.schedule import UNLIMITED, Order
from speculation.trees.tree import Node, Tree

PassTime = Callable[[int], float]
"""Seconds of a pass by its rows."""

MOST_LEVELS = 16
"""More levels are not considered."""
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
    best = Plan(0.0, 1, 0, 0.0)
    for roots in range(1, -(-sequences // stages) + 1):
        tokens = 0.0
        for levels in range(min(MOST_LEVELS, guesses // roots) + 1):
            tokens += right**levels
            stage_s, drafts_s = run_s(roots * (levels + 1)), levels * draft_s(roots)
            turn_s = max(stage_s, (stages * stage_s + drafts_s) / (sequences // roots), drafts_s)
            if roots * tokens > best.rate * turn_s:
                best = Plan(roots * tokens / turn_s, roots, levels, drafts_s)
    return best


class Orders:
    """What drafters have been told of each sequence: to draft without end, or so many levels for a root."""

    def __init__(self, draft_batch: int) -> None:
        self._draft_batch = draft_batch
        self._is_endless: dict[int, bool] = {}  # by sequence; those that have been told
        self._roots: dict[int, Node] = {}  # that levels were ordered for last
        self._late_at: dict[int, float] = {}  # until when an answer is waited for, of those that are missing

    def closed(self, sequence: int) -> None:
        """``sequence`` is over."""
        for kept in (self._is_endless, self._roots, self._late_at):
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
        self._is_endless.clear()
        self._roots.clear()

    def without_end(self, trees: Sequence[Tree]) -> Order | None:
        """The next order, if all sequences are to be drafted for always."""
        if len(self._is_endless) < len(trees) or not all(self._is_endless.values()):
            for tree in trees:
                if not self._is_endless.get(tree.sequence) and tree.sequence not in self._late_at:
                    self._is_endless[tree.sequence] = True
                    return Order(UNLIMITED, draft_batch=self._draft_batch, sequence=tree.sequence, shared=True)
        return None

    def of_levels(self, trees: Sequence[Tree], levels: int, drafts_s: float, now: float) -> Order | None:
        """The next order, if each unsent root is to have ``levels`` levels, which take ``drafts_s``."""
        for tree in trees:
            sequence = tree.sequence
            if sequence in self._late_at:
                continue
            if levels and tree.root.pending and self._roots.get(sequence) is not tree.root:
                self._roots[sequence], self._is_endless[sequence] = tree.root, False
                self._late_at[sequence] = now + LATE * drafts_s
                return Order(levels, draft_batch=1, sequence=sequence)
            if self._is_endless.get(sequence, True):
                self._is_endless[sequence] = False
                return Order(0, sequence=sequence)
        return None

    def late_at(self, tree: Tree) -> float:
        """Until when the root of ``tree`` waits; 0 if it does not."""
        return self._late_at.get(tree.sequence, 0.0)
