"""Many sequences on one rank, where draft and target take turns: whether the draft makes a further pass.

The rule is that of alternation.py with the sums over all sequences: a pass serves the best leaves of all trees, and a
run all unsent roots. The rows of a run are those that are most useful per second since the last run:

    argmax over r of (u_1 + ... + u_r) / (S + T(r))      S: seconds since the last run returned
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from speculation.schedules.alternation import FORGET, MOST_LATE, PATIENCE, TRIES, WEIGHT, pays
from speculation.schedules.cost_curve import CostCurve
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import Situation
from speculation.trees.forest import give_back, probabilities, take_best
from speculation.trees.tree import Node, Tree


class Turns:
    """Decides for several sequences. ``curve``: T(r); ``pass_s``: what a draft pass is known to take, if anything is;
    ``right``: how often a token is thought to be among its parent's guesses at first."""

    def __init__(self, policy: Policy, curve: CostCurve, pass_s: float | None, right: float) -> None:
        self._policy = policy
        self._curve = curve
        self._pass_s = pass_s
        self._asked, self._guessed = TRIES, TRIES * right
        self._seen: dict[int, tuple[int, int]] = {}  # by sequence its tree's counts
        self._ordered_at: float | None = None
        self._grown = 0
        self._is_dry = False  # the draft proposed nothing since the last run
        self._began = 0.0
        self._refused = 0

    def closed(self, tree: Tree) -> None:
        """The sequence of ``tree`` is over."""
        self._seen.pop(tree.sequence, None)

    def accepted(self, tree: Tree, now: float) -> None:
        """``tree`` has a new root."""
        asked, guessed = self._seen.get(tree.sequence, (0, 0))
        self._seen[tree.sequence] = tree.asked, tree.guessed
        fade = FORGET ** (tree.asked - asked)
        self._asked = fade * self._asked + tree.asked - asked
        self._guessed = fade * self._guessed + tree.guessed - guessed
        self._began, self._is_dry = now, False

    def next(self, now: Situation) -> list[Node] | None:
        """The nodes of the next run, taken from their trees; None if the draft is to make a pass."""
        grown = sum(tree.grown for tree in now.trees)
        if self._ordered_at is not None:
            self._is_dry = grown <= self._grown
            if not self._is_dry:
                self._learn(now.now - self._ordered_at)
            self._ordered_at = None
        nodes = self._rows(now)
        if nodes and self._wants_pass(nodes, now):
            give_back({tree.sequence: tree for tree in now.trees}, nodes)
            self._ordered_at, self._grown = now.now, grown
            return None
        return nodes

    def _learn(self, pass_s: float) -> None:
        known = self._pass_s
        self._pass_s = pass_s if known is None else known + WEIGHT * (min(pass_s, MOST_LATE * known) - known)

    def _rows(self, now: Situation) -> list[Node]:
        trees = {tree.sequence: tree for tree in now.trees}
        most = max(len(trees), min(len(trees) + self._policy.max_rows, self._curve.reach))
        nodes = take_best(now.trees, most, now.root_room, now.room, self._policy.min_path_prob)
        known = sum(node is trees[node.sequence].root for node in nodes)
        spent_s = max(0.0, now.now - self._began)
        best, most_useful = known, 0.0
        for rows, total in enumerate(accumulate(probabilities(trees, nodes)), 1):
            useful = total / (spent_s + self._curve.seconds(rows))
            if rows >= known and useful > most_useful:
                best, most_useful = rows, useful
        give_back(trees, nodes[best:])
        return nodes[:best]

    def _wants_pass(self, nodes: Sequence[Node], now: Situation) -> bool:
        if self._is_dry:
            return False
        if self._pass_s is None:
            return True
        trees = {tree.sequence: tree for tree in now.trees}
        right = self._guessed / self._asked
        useful = probabilities(trees, nodes)
        found = [
            share * max(0.0, right - sum(probabilities(trees, list(node.children.values()))) / share)
            for share, node in zip(useful, nodes, strict=True)
            if not node.is_drafted
        ]
        most = len(trees) + self._policy.max_rows
        wants = pays(useful, found, max(0.0, now.now - self._began), self._pass_s, right, self._curve, most)
        if not wants and not any(node.is_drafted for node in nodes):
            self._refused += 1
            if self._refused % PATIENCE == 0:
                self._pass_s = None
        return wants
