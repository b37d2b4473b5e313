"""Holding a new root back: it is certain, but alone in its run, and what the draft finds next would ride along.

A surprise takes a trip through the pipeline, however it is sent. If the root leaves at once, everything below it enters
one stage time later, in groups of as many levels as the draft finds in that time. If it waits for the first k levels,
all are later by k draft passes, but a text that is wrong again within these levels is known one stage time earlier.
With chances ``p`` that a next token has been guessed, ``d`` seconds for a level of drafts, ``t`` for a stage and n =
t / d, the expected delay is k d + t p^(k+1) / (1 - p^n), least where a further level no longer saves what it costs.
Where the draft is not much quicker than a stage, that is at once; where one stage is the whole pipeline, it is chain or
tree speculation of the best length.
"""

from __future__ import annotations

import math

from speculation.tree import Node, Tree

WEIGHT = 0.25
"""How much one measurement counts against those before it."""
FORGET = 0.98
TRIAL = 0.5
"""Stage times that the first new root waits, so that something is known."""
GRACE = 1.5
"""How many times the expected time of its drafts a root is held; then it goes without them."""


class Hold:
    """Says whether a new root waits, and ``until`` when at most."""

    def __init__(self) -> None:
        self._tokens, self._surprises = 2.0, 1.0  # of late, where somebody had guessed; at first what is supposed
        self._level_s: float | None = None  # what a level of drafts takes
        self.opened()

    def opened(self) -> None:
        """A new request."""
        self._root: Node | None = None
        self._is_guessed = False  # whether the root has guesses below it
        self._since = 0.0
        self._is_measured = True
        self._is_held = False
        self.until = 0.0

    def accepted(self, tokens: int) -> None:
        """So many tokens were committed."""
        self._tokens = FORGET * self._tokens + tokens
        self._surprises *= FORGET

    def look(self, tree: Tree, now: float) -> None:
        """See what ``tree`` has become: a new root that nobody had sent is a surprise where anything had been guessed,
        and else tells nothing; its first children end the wait for a level of drafts."""
        root = tree.root
        if root is not self._root:
            if root.pending and self._is_guessed:
                self._surprises += 1
            elif root.pending and self._root is not None:
                self._tokens -= 1
            self._root, self._since = root, now
            self._is_measured = not root.pending or bool(root.children)
            self._is_held = False
        elif not self._is_measured and root.children:
            self._learn(now - self._since)
        self._is_guessed = bool(root.children)

    def wants(self, stage_s: float, most_levels: int, now: float) -> bool:
        """Whether the root, which no run holds, should wait for drafts; at most for ``most_levels``."""
        assert self._root is not None
        levels = _levels(self._root)
        if self._level_s is None:
            wanted, wait_s = min(most_levels, 1), TRIAL * stage_s
        else:
            wanted = min(most_levels, self._worth_waiting_for(stage_s))
            wait_s = GRACE * wanted * self._level_s
        if levels >= wanted:
            return False
        self.until = self._since + wait_s
        if now >= self.until:
            if self._is_held and not levels:
                self._learn(2 * wait_s)  # nobody drafts, or slowly
            return False
        self._is_held = True
        return True

    def _learn(self, level_s: float) -> None:
        self._is_measured = True
        known = self._level_s
        if known is None:
            self._level_s = level_s if self._is_held else None
        elif self._is_held or level_s < known:  # of a root that has left: the draft may have waited for its stage
            self._level_s = known + WEIGHT * (level_s - known)

    def _worth_waiting_for(self, stage_s: float) -> int:
        """The levels that give the least expected delay."""
        guessed = 1 - self._surprises / self._tokens if self._tokens else 0.0
        if not self._level_s or not 0 < guessed < 1 or self._level_s >= stage_s:
            return 0
        groups = stage_s / self._level_s
        least = (1 - guessed**groups) / (groups * (1 - guessed))  # a level must be reached as often as that
        return max(0, math.ceil(math.log(least) / math.log(guessed)) - 1) if least < 1 else 0


def _levels(root: Node) -> int:
    """How deep the guesses below ``root`` are, along the most probable ones."""
    levels, node = 0, root
    while node.children:
        node = max(node.children.values(), key=lambda child: child.logp)
        levels += 1
    return levels
