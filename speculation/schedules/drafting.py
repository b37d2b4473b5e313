"""When the next level of a tree will be drafted, and how probable it is, where drafters work without orders.

A drafter evaluates leaves of several sequences in one pass, and the nodes that it found arrive together. So the time
between two arrivals is the time of a pass, unless the drafter was idle.

    ready = b + d    with b = E if the tree's best leaf was there at E, else max(E + d, the time when the leaf came)

    E   end of the last pass, when the pass under way began
    d   time of a draft pass, in seconds
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from speculation.trees.tree import Node, Tree

WEIGHT = 0.25
"""Weight of a new measurement in the exponentially weighted mean of ``d``."""
GRACE = 1.25
"""A pass is waited for until this multiple of ``d`` after it should be there; a longer pass counts as this multiple."""
TOGETHER = 0.1
"""Nodes that arrive within this part of ``d`` are of one pass."""
RIGHT_WEIGHT = 0.02
"""Weight of a new tree in the mean probability of first choices."""


class Drafting:
    """The drafts of all sequences. ``pass_s``: what a pass is known to take, if anything is; ``right``: how often a
    first choice is thought to be right at first."""

    def __init__(self, pass_s: float | None, right: float) -> None:
        self.right = right
        self.pass_s = pass_s or 0.0
        self._ended_at = 0.0  # E
        self._grown: dict[int, int] = {}  # by sequence
        self._leaf_at: dict[int, float] = {}  # since when a tree has its best leaf
        self._roots: dict[int, Node] = {}
        self._best: dict[int, tuple[Node, int, float]] = {}  # root, size of the tree, probability of its best leaf
        self._mute: set[int] = set()  # sequences that were waited for in vain

    def closed(self, sequence: int) -> None:
        """``sequence`` is over."""
        for kept in (self._grown, self._leaf_at, self._roots, self._best):
            kept.pop(sequence, None)
        self._mute.discard(sequence)

    def look(self, trees: Sequence[Tree], now: float, is_awaited: bool, is_endless: bool = True) -> None:
        """Note which trees have new roots or nodes. ``is_awaited``: whether a run waited for nodes until now.
        ``is_endless``: whether drafters work without orders; if they do not, nothing is learned of their passes."""
        has_grown = False
        for tree in trees:
            sequence, root = tree.sequence, tree.root
            if self._roots.get(sequence) is not root:
                self._roots[sequence], self._leaf_at[sequence] = root, now
            if self._grown.get(sequence) != tree.grown:
                if sequence in self._grown:
                    has_grown = True
                    self._mute.discard(sequence)
                self._grown[sequence], self._leaf_at[sequence] = tree.grown, now
                if root.children:
                    best = max(child.logp for child in root.children.values())
                    self.right += RIGHT_WEIGHT * (math.exp(best - root.logp) - self.right)
        if has_grown and is_endless:
            self._end_pass(now, is_awaited)

    def _end_pass(self, now: float, is_awaited: bool) -> None:
        """Nodes have arrived."""
        took_s, known = now - self._ended_at, self.pass_s
        if took_s < TOGETHER * known:
            return
        if not known:
            self.pass_s = took_s if self._ended_at else 0.0
        elif is_awaited or took_s < known:  # if no run waits, the drafter may have been idle
            self.pass_s += WEIGHT * (min(took_s, GRACE * known) - known)
        self._ended_at = now

    def wait_s(self, tree: Tree, now: float) -> float | None:
        """Seconds until the next level of ``tree`` is expected; None if it is not worth waiting for any more."""
        sequence = tree.sequence
        leaf_at = self._leaf_at.get(sequence, now)
        if sequence in self._mute or not self.pass_s:
            return None
        if now >= self.until(tree, now):
            self._mute.add(sequence)
            return None
        began_at = self._ended_at  # the pass that has this leaf
        if leaf_at > began_at:
            began_at = max(leaf_at, began_at + self.pass_s)  # an idle drafter begins at once
        return max(0.0, began_at + self.pass_s - now)

    def until(self, tree: Tree, now: float) -> float:
        """When ``tree`` has been waited for in vain."""
        return self._leaf_at.get(tree.sequence, now) + (1 + GRACE) * self.pass_s

    def leaf(self, tree: Tree) -> float:
        """The path probability of the best node of ``tree`` that no draft has evaluated."""
        known = self._best.get(tree.sequence)
        if known is None or known[0] is not tree.root or known[1] != tree.size:
            known = self._best[tree.sequence] = tree.root, tree.size, tree.probability(best_leaf(tree))
        return known[2]


def best_leaf(tree: Tree) -> Node:
    """The most probable node of ``tree`` that no draft has evaluated."""
    heap, serial = [(-tree.root.logp, 0, tree.root)], 0
    node = tree.root
    while heap:
        node = heapq.heappop(heap)[2]
        if not node.is_drafted:
            break
        for child in node.children.values():
            serial += 1
            heapq.heappush(heap, (-child.logp, serial, child))
    return node
