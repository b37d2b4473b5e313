"""Alternation on one rank: whether the draft makes a further pass before the target's next run.

The draft makes a pass if, for some number of passes j = 1 ... FAR,

    U_j / (S + j d + T(r_j))  >  U_0 / (S + T(k))

    S     time since the current root was accepted, in seconds: the target has been idle since then
    d     time of a draft pass, in seconds
    T(r)  time of a target pass of r rows, in seconds (cost_curve.py)
    U_0   useful rows expected of the run at hand, which has k rows
    U_j   useful rows expected of the best run after j further passes, which has r_j rows
    g     probability that a token was drafted, measured

Draft and target never compute at the same time on one rank, so a run pays for the draft passes before it. Both sides of
the inequality are useful rows per second. The first pass is expected to add g times the probability of each undrafted
node of the run; each further pass adds g times the pass before it. The result is tree speculation with adaptive depth.
The draft works on orders of one pass and rests between orders, so each pass evaluates the leaves that are best at its
start.
"""

from __future__ import annotations

from speculation.schedules.cost_curve import CostCurve
from speculation.schedules.launch_delay import Offer
from speculation.schedules.schedule import Order
from speculation.trees.tree import Node, Tree

WEIGHT = 0.25
"""Weight of a new measurement in the exponentially weighted mean of ``d``."""
MOST_LATE = 1.25
"""A measured pass counts as at most this multiple of ``d``."""
FORGET = 0.98
"""Decay per token of the counts that give ``g``."""
FAR = 8
"""Look-ahead in passes: one pass may add too little where few rows cost nearly as much as many."""
TRIES = 2.0
"""Weight, in tokens, of what is thought of ``g`` before anything is measured."""
PATIENCE = 50
"""After so many roots without a draft pass, ``d`` is measured again."""


class Alternation:
    """Decides whether a draft pass comes before the next run; it takes the place of LaunchDelay on one rank."""

    drafts_unasked = False

    def __init__(self, pass_s: float | None = None, right: float = 0.5) -> None:
        """``pass_s``: what a draft pass is known to take, if anything is; then ``right`` is thought of ``g``."""
        self._asked, self._guessed = 2.0, 1.0  # decayed counts; initially a prior
        if pass_s is not None:  # the draft must be tried all the same
            self._asked, self._guessed = TRIES, TRIES * right
        self._pass_s = pass_s
        self._refused = 0
        self.opened()

    def opened(self) -> None:
        """A new request."""
        self._ordered_at: float | None = None
        self._is_answered = False
        self._reads_prompt = True
        self._root: Node | None = None
        self._began = 0.0  # when the root was accepted
        self._grown = 0
        self._seen = (0, 0)  # the tree's counts at the last root
        self._is_dry = False  # the draft proposed nothing

    def drafted(self) -> None:
        """The ordered pass is done."""
        self._is_answered = True

    def accepted(self, tokens: int) -> None:
        """Nothing: ``look`` reads the counts from the tree."""

    def look(self, tree: Tree, now: float) -> None:
        """Update the estimates from ``tree``."""
        if tree.root is not self._root:
            self._root, self._is_dry, self._began = tree.root, False, now
            (asked, guessed), self._seen = self._seen, (tree.asked, tree.guessed)
            fade = FORGET ** (tree.asked - asked)
            self._asked = fade * self._asked + tree.asked - asked
            self._guessed = fade * self._guessed + tree.guessed - guessed
        if self._ordered_at is not None and self._is_answered:
            self._is_dry = tree.grown == self._grown
            if not self._is_dry and not self._reads_prompt:
                self._learn(now - self._ordered_at)
            self._ordered_at, self._reads_prompt = None, False

    def is_on(self, now: float) -> bool:
        """Whether an ordered draft pass is under way."""
        return self._ordered_at is not None

    def _learn(self, pass_s: float) -> None:
        known = self._pass_s
        self._pass_s = pass_s if known is None else known + WEIGHT * (min(pass_s, MOST_LATE * known) - known)

    def instead(self, offer: Offer) -> Order | None:
        """An Order of one pass, if the draft is to make one before the run; None to launch."""
        if self._is_dry or not offer.curve.seconds(1):
            return None
        if self._pass_s is not None and not self._pays(self._pass_s, offer):
            if not offer.tree.root.is_drafted:
                self._refused += 1
                if self._refused % PATIENCE == 0:
                    self._pass_s = None
            return None
        self._ordered_at, self._is_answered, self._grown = offer.now, False, offer.tree.grown
        return Order(1, draft_batch=offer.draft_batch)

    def _pays(self, pass_s: float, offer: Offer) -> bool:
        """The inequality of this module, with ``pass_s`` for d."""
        tree, nodes, curve, most_rows, draft_batch, now = offer
        spent_s = now - self._began
        useful = tree.probabilities(nodes)
        right = self._guessed / self._asked
        found = [
            share * max(0.0, right - sum(tree.probabilities(node.children.values())) / share)
            for share, node in zip(useful, nodes, strict=True)
            if not node.is_drafted
        ][:draft_batch]
        return pays(useful, found, spent_s, pass_s, right, curve, most_rows)


def pays(
    useful: list[float],
    found: list[float],
    spent_s: float,
    pass_s: float,
    right: float,
    curve: CostCurve,
    most_rows: int,
) -> bool:
    """The inequality of this module. ``useful``: the probabilities of the rows of the run at hand; ``found``: useful
    rows that the next pass is expected to add."""
    least = sum(useful) / (spent_s + curve.seconds(len(useful)))
    for _ in range(FAR):
        spent_s += pass_s
        useful = sorted(useful + found, reverse=True)[:most_rows]
        rows = curve.best_count(useful)
        if sum(useful[:rows]) > least * (spent_s + curve.seconds(rows)):
            return True
        found = [right * share for share in found]
    return False
