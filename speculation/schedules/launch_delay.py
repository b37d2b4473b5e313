"""The launch delay: whether a run waits for the draft pass under way.

A run waits if

    w M < T a / (1 - p^n)        with p = 1 - a0 / L and n = s / d

    w    time until the draft pass under way ends, in seconds
    d    time of a draft pass, in seconds
    s    time of the first stage for the larger run, in seconds
    n    draft passes per launch
    T    time that one larger run saves against two runs, in seconds: T = s(k) + s(max(1, r - k)) - s(r) for a run of k
         rows that becomes a run of r rows; T = s where rows cost nothing
    a0   useful rows that the pass under way is expected to add
    a    useful rows that the larger run is expected to have in addition; a = a0 where rows cost nothing
    u    useful rows expected of the run at hand
    K    tokens per correction, measured
    L    useful rows expected of all next passes until the next correction: max(a0, K - u); a0 if d > s
    M    useful rows expected until the next correction: u + L
    p    ratio of useful rows that one pass adds to those that the pass before it added

A row is useful if the target's path contains its node. A correction is a token that was not drafted.

Derivation. Passes add a0, p a0, p^2 a0, ... useful rows, and the sum of this series is L. If the run waits, all M rows
are late by w. If the run leaves, the rows of the next pass follow one launch later, and the rows of later passes move
back in turn: the sum of these delays is T a (1 + p^n + p^2n + ...) = T a / (1 - p^n). The rule compares both sums.

Consequences. A new root, certain but alone, waits for the first levels of a quick draft. For one stage the result is
tree speculation of the best depth. If a draft pass takes a large part of a stage's time, launches follow the ends of
draft passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from speculation.schedules.cost_curve import CostCurve
from speculation.schedules.schedule import Wait
from speculation.trees.tree import Node, Tree

WEIGHT = 0.25
"""Weight of a new measurement in the exponentially weighted mean of ``d``."""
FORGET = 0.98
"""Decay per commit of the counts of tokens and corrections."""
TRIAL = 0.5
"""Stage times that a run waits at most while ``d`` is unknown, so that ``d`` is measured."""
GRACE = 1.25
"""A run waits for at most this multiple of ``d``; a longer pass also counts as this multiple."""
JUST_BEGUN = 0.95
"""If more than this part of a pass is still to come, only a run with the root may wait."""
LEAST = 1e-6
"""Fewer additional useful rows than this never delay a run."""


class Offer(NamedTuple):
    """The best run at time ``now``: ``nodes`` of ``tree``, with pass times by ``curve``. A run may have up to
    ``most_rows`` rows. A draft pass evaluates ``draft_batch`` leaves."""

    tree: Tree
    nodes: Sequence[Node]
    curve: CostCurve
    most_rows: int
    draft_batch: int
    now: float


class LaunchDelay:
    """Decides whether a run waits for the draft pass under way, and until when at most."""

    drafts_unasked = True

    def __init__(self, pass_s: float | None = None) -> None:
        """``pass_s``: what a draft pass is known to take, if anything is."""
        self._tokens, self._surprises = 2.0, 1.0  # decayed counts; initially a prior
        self._pass_s = pass_s  # d
        self.opened()

    def opened(self) -> None:
        """A new request."""
        self._root: Node | None = None
        self._is_guessed = False  # whether the root has drafted children
        self._grown = 0
        self._since = 0.0  # when the draft pass under way began
        self._is_sure = False  # whether that time was observed
        self._is_held = self._has_changed = False
        self._until = 0.0

    def accepted(self, tokens: int) -> None:
        """``tokens`` tokens were committed."""
        self._tokens = FORGET * self._tokens + tokens
        self._surprises *= FORGET

    def drafted(self) -> None:
        """Nothing: drafters work without orders here."""

    def look(self, tree: Tree, now: float) -> None:
        """Update the estimates from ``tree``. A new, unsent root is a correction if the old root had drafted children;
        otherwise the token is not counted. New nodes end a draft pass."""
        root, is_new, has_grown = tree.root, tree.root is not self._root, tree.grown != self._grown
        if is_new:
            if root.pending and self._is_guessed:
                self._surprises += 1
            elif root.pending and self._root is not None:
                self._tokens -= 1
            if root.pending or not root.children:  # otherwise the draft pass under way goes on
                self._begin(now, is_sure=not root.children)
        elif has_grown:
            if self._is_sure:
                self._learn(now - self._since)
            self._begin(now, is_sure=True)
        self._root, self._grown, self._is_guessed = root, tree.grown, bool(root.children)
        self._has_changed = is_new or has_grown

    def _begin(self, now: float, is_sure: bool) -> None:
        self._since, self._is_sure, self._is_held = now, is_sure, False

    def is_on(self, now: float) -> bool:
        """Whether a run waits now: its delay is not over and the tree has not changed."""
        return self._is_held and now < self._until and not self._has_changed

    def instead(self, offer: Offer) -> Wait | None:
        """A Wait, if the run should wait for the draft pass under way; None to launch."""
        stage_s = offer.curve.seconds(len(offer.nodes))
        was_held, self._is_held = self._is_held, False
        until = self._since + (TRIAL * stage_s if self._pass_s is None else GRACE * self._pass_s)
        if offer.now >= until or not stage_s:
            if was_held and self._is_sure:  # no drafter works, or all are slow
                self._pass_s = GRACE * self._pass_s if self._pass_s is not None else stage_s
            return None
        if self._pass_s is not None and not self._pays(self._pass_s, offer):
            return None
        self._until, self._is_held = until, True
        return Wait(until)

    def _learn(self, pass_s: float) -> None:
        known = self._pass_s
        if known is None:
            self._pass_s = pass_s
        elif self._is_held or pass_s < known:  # if no run waits, the draft may be waiting for its stage
            self._pass_s = known + WEIGHT * (min(pass_s, GRACE * known) - known)

    def _pays(self, pass_s: float, offer: Offer) -> bool:
        """The inequality of this module, with ``pass_s`` for d."""
        tree, nodes, curve, most_rows, draft_batch, now = offer
        wait_s = max(0.0, self._since + pass_s - now)
        if wait_s > JUST_BEGUN * pass_s and nodes[0] is not tree.root:
            return False
        guessed = 1 - self._surprises / self._tokens
        useful = tree.probabilities(nodes)
        found = [guessed * share for share, node in zip(useful, nodes, strict=True) if not node.children][:draft_batch]
        here, added = sum(useful), sum(found)
        if added < LEAST:
            return False
        both = sorted(useful + found, reverse=True)[:most_rows]
        rows = curve.best_count(both)
        more, stage_s = sum(both[:rows]) - here, curve.seconds(rows)
        saved_s = curve.seconds(len(nodes)) + curve.seconds(max(1, rows - len(nodes))) - stage_s
        later = added  # L = a0: a stage is free before a slower draft pass ends
        if pass_s <= stage_s:
            later = max(added, self._tokens / self._surprises - here)
        decay: float = (1 - added / later) ** (stage_s / pass_s)
        return wait_s * (here + later) * (1 - decay) < saved_s * more
