"""The forest: the token trees of all sequences that are decoded, taken from as if they were one.

A node's path probability counts from the root of its own tree, so a known next token has 1, whatever its sequence.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence

from speculation.trees.tree import Node, Tree


def pending_roots(trees: Iterable[Tree]) -> int:
    """How many ``trees`` have a root that has to be sent."""
    return sum([tree.root.pending for tree in trees])


def take_best(trees: Sequence[Tree], most: int, roots: int, guesses: int, min_path_prob: float) -> list[Node]:
    """Take the ``most`` probable pending nodes of all ``trees``, parents before children, of which no more than
    ``roots`` are roots and ``guesses`` are guesses, and none on a path less probable than ``min_path_prob``. A tree
    whose root has to stay is left alone. Among equals the tree that stands first in ``trees`` is served first."""
    least = math.log(min_path_prob) if min_path_prob > 0 else -math.inf
    heads: list[tuple[float, int, Node]] = []
    for index, tree in enumerate(trees):
        if (node := tree.best()) is not None:
            heads.append((tree.root.logp - node.logp, index, node))
    heapq.heapify(heads)
    taken: list[Node] = []
    while heads and len(taken) < most:
        cost, index, node = heapq.heappop(heads)
        tree = trees[index]
        if node is tree.root:
            if roots <= 0:
                continue
            roots -= 1
        elif guesses <= 0 or -cost < least:
            continue
        else:
            guesses -= 1
        tree.take(node)
        taken.append(node)
        if (following := tree.best()) is not None:
            heapq.heappush(heads, (tree.root.logp - following.logp, index, following))
    return taken


def give_back(trees: Mapping[int, Tree], nodes: Sequence[Node]) -> None:
    """Make ``nodes``, taken last and in this order, pending again. ``trees``: by sequence."""
    by_sequence: dict[int, list[Node]] = {}
    for node in nodes:
        by_sequence.setdefault(node.sequence, []).append(node)
    for sequence, mine in by_sequence.items():
        trees[sequence].give_back(mine)


def probabilities(trees: Mapping[int, Tree], nodes: Sequence[Node]) -> list[float]:
    """The path probabilities of ``nodes``, each in its own tree. ``trees``: by sequence."""
    return [math.exp(node.logp - trees[node.sequence].root.logp) for node in nodes]
