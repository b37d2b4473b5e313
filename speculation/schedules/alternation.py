"""Whose turn it is, where one rank is everything: the draft's, for one more pass, or the target's, with what is known.

Draft and target never work at the same time there, so a run pays for the passes before it. The draft goes first as long
as the run then gives more useful rows per second, all time since the last run counted. That is tree speculation with
the depth that suits what is known at each moment. The draft works to orders of one pass, so that what it evaluates is
chosen when it is its turn; between orders it rests.
"""

from __future__ import annotations

from speculation.schedules.launch_delay import Offer
from speculation.schedules.schedule import Order
from speculation.trees.tree import Node, Tree

WEIGHT = 0.25
"""How much one measurement counts against those before it."""
MOST_LATE = 1.25
"""How many times its usual time a pass may count as."""
FORGET = 0.98
"""What is left of a token's weight with every further one that tells how often the draft is right."""
FAR = 8
"""Passes that are looked ahead: one may add too little where few rows cost nearly as much as many."""
PATIENCE = 50
"""So often may nobody have guessed anything, the draft being too slow, until it is measured again."""


class Alternation:
    """Says whether the draft is next: a launch delay for one rank (see launch_delay.py)."""

    drafts_unasked = False

    def __init__(self) -> None:
        self._asked, self._guessed = 2.0, 1.0  # tokens after guesses, of late, and those among them; at first supposed
        self._pass_s: float | None = None
        self._refused = 0
        self.opened()

    def opened(self) -> None:
        """A new request."""
        self._ordered_at: float | None = None
        self._is_answered = False
        self._reads_prompt = True
        self._root: Node | None = None
        self._began = 0.0  # when it was accepted: the target is idle since
        self._grown = 0
        self._seen = (0, 0)  # how many tokens there were after guesses, and among them
        self._is_dry = False  # the draft had nothing to say to the root

    def drafted(self) -> None:
        """The draft's turn is over."""
        self._is_answered = True

    def accepted(self, tokens: int) -> None:
        """So many tokens were committed; the tree tells more of them."""

    def look(self, tree: Tree, now: float) -> None:
        """See what ``tree`` has become."""
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
        """Whether it is the draft's turn."""
        return self._ordered_at is not None

    def _learn(self, pass_s: float) -> None:
        known = self._pass_s
        self._pass_s = pass_s if known is None else known + WEIGHT * (min(pass_s, MOST_LATE * known) - known)

    def instead(self, offer: Offer) -> Order | None:
        """A pass, if the draft is to make one before the run."""
        if self._is_dry or not offer.curve.seconds(1):
            return None
        if self._pass_s is not None and not self._pays(self._pass_s, offer):
            if not offer.tree.root.is_drafted:
                self._refused += 1
                if self._refused % PATIENCE == 0:
                    self._pass_s = None
            return None
        self._ordered_at, self._is_answered, self._grown = offer.now, False, offer.tree.grown
        return Order(1, draft_batch=offer.leaves)

    def _pays(self, pass_s: float, offer: Offer) -> bool:
        """Whether a run gives more useful rows per second, since the target was last at work, after some more passes.
        Of each of them as much is expected as of the one before, in so far as the draft is right."""
        tree, nodes, curve, most_rows, leaves, now = offer
        spent_s = now - self._began
        useful = tree.probabilities(nodes)
        right = self._guessed / self._asked
        found = [
            share * max(0.0, right - sum(tree.probabilities(node.children.values())) / share)
            for share, node in zip(useful, nodes, strict=True)
            if not node.is_drafted
        ][:leaves]
        least = sum(useful) / (spent_s + curve.seconds(len(nodes)))
        for _ in range(FAR):
            spent_s += pass_s
            useful = sorted(useful + found, reverse=True)[:most_rows]
            rows = curve.best_count(useful)
            if sum(useful[:rows]) > least * (spent_s + curve.seconds(rows)):
                return True
            found = [right * share for share in found]
        return False
