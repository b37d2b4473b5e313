"""The token tree: every continuation somebody has guessed of the tokens accepted so far.

The root is the last accepted token. A node is *pending* until somebody takes it (the orchestrator sends it to the
target, a drafter evaluates it); nodes are taken best first by path probability, parents before children. When the
target has verified the root, the tree advances: the child that holds the target's token becomes the root, with all that
was guessed below it, and every other branch dies.

Probabilities are kept as sums of logarithms from the first root on, never rescaled: advancing shifts all living nodes
by the same constant, so their order stands.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

from pipeinfer.core.messages import NO_SLOT, Row, TopToken

LEAST_LOGP = -100.0
"""What counts as impossible; also what a number that is none counts as."""
SLACK = 32
"""How many of the dead a list of nodes may have before it is swept, beside as many or twice as many as are alive."""


class Node:
    """A token of ``sequence`` after its parent's tokens. ``slot`` and ``run`` say where it was sent, ``choice`` what
    follows it, and ``choice_top`` the most probable tokens there, if they are wanted.

    ``rank``, ``claim`` and ``source``: whose k-th guess it was, and the log-probability that was claimed for it."""

    __slots__ = (
        "alive", "children", "choice", "choice_logp", "choice_top", "claim", "is_drafted", "is_open", "logp", "name",
        "parent", "pending", "position", "rank", "run", "sequence", "slot", "source", "token",
    )  # fmt: skip

    def __init__(
        self,
        token: int,
        parent: Node | None,
        logp: float,
        position: int,
        source: int | None = None,
        rank: int = 0,
        claim: float = 0.0,
        sequence: int = 0,
    ) -> None:
        self.token = token
        self.sequence: int = sequence if parent is None else parent.sequence
        self.parent = parent
        self.logp = logp
        self.position = position
        self.children: dict[int, Node] = {}
        self.pending = True
        self.is_open = False  # whether its children are among the unsent nodes
        self.is_drafted = False  # whether a draft model has evaluated it
        self.alive = True
        self.slot: int | None = None
        self.run: int | None = None
        self.choice: int | None = None
        self.choice_logp = 0.0
        self.choice_top: tuple[TopToken, ...] = ()
        self.name: int | None = None
        self.source = source
        self.rank = rank
        self.claim = claim

    def row(self, slot: int) -> Row:
        """The row of a run that carries this node in slot ``slot``. Its parent has a slot by then, or is the prompt's
        end."""
        parent = self.parent
        above = NO_SLOT if parent is None or parent.slot is None else parent.slot
        return Row(self.token, slot, above, self.position, self.sequence)


class Tree:
    """A tree of ``sequence``, of at most ``max_nodes`` living nodes, rooted at ``token``. ``grown``: how many guesses
    it ever took; ``asked``: how many tokens were accepted after a draft's guesses, ``guessed``: how many had been
    guessed there."""

    def __init__(self, token: int, position: int, max_nodes: int, sequence: int = 0) -> None:
        self.root = Node(token, None, 0.0, position, sequence=sequence)
        self.sequence = sequence
        self.max_nodes = max_nodes
        self.size = 1
        self.grown = self.asked = self.guessed = 0
        self._serial = 0
        self._unsent: list[tuple[float, int, Node]] = []
        self._push(self.root)

    def _push(self, node: Node) -> None:
        self._serial += 1
        heapq.heappush(self._unsent, (-node.logp, self._serial, node))

    def add(
        self, parent: Node, token: int, logp: float, source: int | None = None, rank: int = 0, claim: float = 0.0
    ) -> Node | None:
        """The child of ``parent`` that holds ``token``, made if need be; None if ``parent`` is dead or the tree full.

        ``logp`` is log P(token | parent). ``source``, ``rank``, ``claim``: see Node; whoever was first is kept."""
        if not parent.alive:
            return None
        node = parent.children.get(token)
        if node is None:
            # Where the tree has passed the parent, only the branch that was accepted is left.
            if parent.position < self.root.position or self.size >= self.max_nodes:
                return None
            if not LEAST_LOGP <= logp <= 0.0:
                logp = min(0.0, max(LEAST_LOGP, logp))
            node = Node(token, parent, parent.logp + logp, parent.position + 1, source, rank, claim)
            parent.children[token] = node
            self.size += 1
            self.grown += 1
            if parent.is_open:  # as _push does, without a call: a dozen nodes an event come by here
                self._serial += 1
                heapq.heappush(self._unsent, (-node.logp, self._serial, node))
        elif node.source is None:
            node.source, node.rank, node.claim = source, rank, claim
        return node

    def best(self) -> Node | None:
        """The pending node of the highest path probability whose parent has been taken; it stays pending."""
        unsent = self._unsent
        while unsent:
            node = unsent[0][2]
            if node.alive and node.pending:
                return node
            heapq.heappop(unsent)
        return None

    def take(self, node: Node) -> None:
        """Mark ``node``, as a rule the one that ``best`` gave, as taken: its children may follow."""
        node.pending = False
        if self._unsent and self._unsent[0][2] is node:
            heapq.heappop(self._unsent)
        if not node.is_open:
            node.is_open = True
            for child in node.children.values():
                self._push(child)

    def take_best(self, most: int, guesses: int, min_path_prob: float) -> list[Node]:
        """Take the ``most`` probable pending nodes, parents first, of which no more than ``guesses`` are guesses, and
        none on a path less probable than ``min_path_prob``. The root is none and certain."""
        taken: list[Node] = []
        unsent, root = self._unsent, self.root
        least = root.logp + (math.log(min_path_prob) if min_path_prob > 0 else -math.inf)
        while unsent and len(taken) < most:
            node = unsent[0][2]
            if node.alive and node.pending:
                if node is not root:
                    if guesses <= 0 or node.logp < least:
                        break
                    guesses -= 1
                taken.append(node)
                node.pending = False
            heapq.heappop(unsent)
            if not (node.pending or node.is_open):
                node.is_open = True
                for child in node.children.values():
                    self._push(child)
        return taken

    def give_back(self, nodes: Sequence[Node]) -> None:
        """Make ``nodes``, taken last and in this order, pending again. Their children wait behind them, being no more
        probable."""
        for node in reversed(nodes):
            node.pending = True
            self._serial += 1
            heapq.heappush(self._unsent, (-node.logp, -self._serial, node))  # before its equals

    def probability(self, node: Node) -> float:
        """The path probability of ``node``: that the target will accept every token from the root down to it."""
        return math.exp(node.logp - self.root.logp)

    def probabilities(self, nodes: Iterable[Node]) -> list[float]:
        """The same for many."""
        base, exp = self.root.logp, math.exp
        return [exp(node.logp - base) for node in nodes]

    def advance(self, token: int) -> tuple[Node, list[Node]]:
        """Accept ``token`` after the root: the new root (made if nobody had guessed it) and the nodes that died."""
        old = self.root
        heir = old.children.pop(token, None)
        if old.is_drafted:
            self.asked += 1
            self.guessed += heir is not None
        if heir is None:
            heir = Node(token, old, old.logp, old.position + 1)
            self.size += 1
            if old.is_open:
                self._push(heir)
        dead = _bury(old)
        old.children = {token: heir}  # late words about the old root still find its heir
        if not old.pending:
            old.parent = None  # nobody asks any more; a passed node still to be evaluated needs its parent's slot
        self.size -= 1 + len(dead)
        self.root = heir
        if len(self._unsent) > SLACK + self.size:
            self._sweep()  # else whoever asks next would wade through the dead, which were the most probable
        return heir, dead

    def _sweep(self) -> None:
        self._unsent = [entry for entry in self._unsent if entry[2].alive and entry[2].pending]
        heapq.heapify(self._unsent)

    def prune(self) -> list[Node]:
        """Forget every guess below the root; returns the nodes that died."""
        dead = _bury(self.root)
        self.root.children = {}
        self.size -= len(dead)
        self._sweep()
        return dead

    def renew(self) -> None:
        """Make the root pending again: its own guess is wanted once more."""
        if not self.root.pending:
            self.root.pending = True
            self._push(self.root)


def descendants(node: Node) -> list[Node]:
    """All nodes below ``node``, parents first."""
    found = [*node.children.values()]
    for child in found:  # which grows under way
        if child.children:
            found += child.children.values()
    return found


def _bury(node: Node) -> list[Node]:
    """Declare all nodes below ``node`` dead, and return them. They forget their children: a circle of parents and
    children would stay in memory until the collector finds it, and that takes longest where time matters most."""
    dead = descendants(node)
    for grave in dead:
        grave.alive = False
        if grave.children:
            grave.children = {}
    return dead
