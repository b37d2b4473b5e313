"""Holding a run back: what the draft is about to find could ride along.

When the first stage is free, what is known can leave at once, and what the pass under way in the draft finds follows a
stage time later; or it can leave together, a moment later. Then everything to come is late by that moment, but the new
guesses are early, and those after them take their places. What pays follows from a simple world: each pass adds p
times the useful rows that the one before it added, every d seconds; runs leave every t seconds, n = t / d passes apart.
Let M useful rows be expected from now to the next surprise, a token that nobody has guessed, where all begins anew;
let the next pass be ready in w seconds and add ``a`` of them. The sum of all their delays is less by t a / (1 - p^n)
if the run waits, and more by w M: it waits where that is less. So a new root, certain but alone, waits for the first
levels of drafts where they are quick, which for one stage is tree speculation of the best depth; and where a pass of
the draft takes a good part of a stage time, runs fall into step with it and leave when it has just ended.

Where rows are not free, ``a`` is what a run of the best size has in addition, and t what one run saves against two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from speculation.schedules.cost_curve import CostCurve
from speculation.schedules.schedule import Wait
from speculation.trees.tree import Node, Tree

WEIGHT = 0.25
"""How much one measurement counts against those before it."""
FORGET = 0.98
TRIAL = 0.5
"""Stage times that the first new root waits, so that something is known."""
GRACE = 1.25
"""How many times its usual time a pass of the draft is waited for, and may count as."""
JUST_BEGUN = 0.95
"""How much of a pass is still to come where only a new root might wait for it; for others that is not worked out."""
LEAST = 1e-6
"""Useful rows that are not worth a thought."""


class Offer(NamedTuple):
    """The best run that there is ``now``: ``nodes`` of ``tree``, at costs by ``curve``. It may have up to ``most_rows``
    rows, and a pass of the draft is over ``leaves`` leaves."""

    tree: Tree
    nodes: Sequence[Node]
    curve: CostCurve
    most_rows: int
    leaves: int
    now: float


class LaunchDelay:
    """Says whether a run waits for the pass under way in the draft, and until when at most."""

    drafts_unasked = True

    def __init__(self) -> None:
        self._tokens, self._surprises = 2.0, 1.0  # of late, where somebody had guessed; at first what is supposed
        self._pass_s: float | None = None  # from one word of the draft to the next
        self.opened()

    def opened(self) -> None:
        """A new request."""
        self._root: Node | None = None
        self._is_guessed = False  # whether the root has guesses below it
        self._grown = 0
        self._since = 0.0  # when the pass under way began
        self._is_sure = False  # whether that is more than supposed
        self._is_held = self._is_news = False
        self._until = 0.0

    def accepted(self, tokens: int) -> None:
        """So many tokens were committed."""
        self._tokens = FORGET * self._tokens + tokens
        self._surprises *= FORGET

    def drafted(self) -> None:
        """An order is done: drafters work without any here."""

    def look(self, tree: Tree, now: float) -> None:
        """See what ``tree`` has become. A new root that nobody had sent is a surprise where anything had been guessed,
        and else tells nothing; new guesses end a pass of the draft."""
        root, is_new, has_grown = tree.root, tree.root is not self._root, tree.grown != self._grown
        if is_new:
            if root.pending and self._is_guessed:
                self._surprises += 1
            elif root.pending and self._root is not None:
                self._tokens -= 1
            if root.pending or not root.children:  # else the draft goes on with what it was at
                self._begin(now, is_sure=not root.children)
        elif has_grown:
            if self._is_sure:
                self._learn(now - self._since)
            self._begin(now, is_sure=True)
        self._root, self._grown, self._is_guessed = root, tree.grown, bool(root.children)
        self._is_news = is_new or has_grown

    def _begin(self, now: float, is_sure: bool) -> None:
        self._since, self._is_sure, self._is_held = now, is_sure, False

    def is_on(self, now: float) -> bool:
        """Whether a run is held, nothing being new."""
        return self._is_held and now < self._until and not self._is_news

    def instead(self, offer: Offer) -> Wait | None:
        """A wait, if the run should wait for the draft's pass, so as to become a larger one."""
        stage_s = offer.curve.seconds(len(offer.nodes))
        was_held, self._is_held = self._is_held, False
        until = self._since + (TRIAL * stage_s if self._pass_s is None else GRACE * self._pass_s)
        if offer.now >= until or not stage_s:
            if was_held and self._is_sure:  # nobody drafts, or slowly
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
        elif self._is_held or pass_s < known:  # while nothing waits for it the draft may wait for its stage
            self._pass_s = known + WEIGHT * (min(pass_s, GRACE * known) - known)

    def _pays(self, pass_s: float, offer: Offer) -> bool:
        """Whether what the next guesses gain is more than what all others lose."""
        tree, nodes, curve, most_rows, leaves, now = offer
        wait_s = max(0.0, self._since + pass_s - now)
        if wait_s > JUST_BEGUN * pass_s and nodes[0] is not tree.root:
            return False
        guessed = 1 - self._surprises / self._tokens
        useful = tree.probabilities(nodes)
        found = [guessed * share for share, node in zip(useful, nodes, strict=True) if not node.children][:leaves]
        here, added = sum(useful), sum(found)
        if added < LEAST:
            return False
        both = sorted(useful + found, reverse=True)[:most_rows]
        rows = curve.best_count(both)
        more, stage_s = sum(both[:rows]) - here, curve.seconds(rows)
        saved_s = curve.seconds(len(nodes)) + curve.seconds(max(1, rows - len(nodes))) - stage_s
        later = added  # drafts slower than stages find them free
        if pass_s <= stage_s:
            later = max(added, self._tokens / self._surprises - here)
        decay: float = (1 - added / later) ** (stage_s / pass_s)
        return wait_s * (here + later) * (1 - decay) < saved_s * more
