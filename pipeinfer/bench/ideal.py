"""The speed of ideal scheduling: a strong reference for continuous tree speculation, not a proven optimum.

Every stage takes one unit of time for a run of up to ``rows`` nodes; cancelling is free, and so are messages, unless
``depth`` is given what they take; the draft knows each child's probability. In every unit the most probable unsent
nodes enter the pipeline, and what leaves it moves the root. Beside it the draft expands up to ``draft_batch`` of the
most probable leaves per pass, until it has guesses for LEAD_RUNS further runs. Synchronous speculation is closed-form:
rounds of a trip and the draft passes before it.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence

from speculation.trees.tree import Node, Tree

VOID = -1
"""The target's choice where no choice of the draft is right."""
LIMIT = 1_000_000
LEAD_RUNS = 6
"""For so many runs the draft finds guesses ahead."""


def ideal(
    depth: float, rows: int, ranks: Sequence[float], draft_time: float, text: Sequence[int], *, draft_batch: int = 8
) -> float:
    """Tokens per unit of time after the first, over ``depth`` stages. ``ranks[k]``: how often the draft's k-th choice
    is right; ``text``: which one is right at each position of this text, VOID for none."""
    tree = Tree(VOID, 0, LIMIT)
    drafted = Drafting(tree, ranks, draft_batch, LEAD_RUNS * rows)
    flight: deque[tuple[float, list[Node]]] = deque()
    now = entry_free_at = first_at = 0.0
    draft_done_at = draft_time
    accepted = 0
    while accepted < len(text):
        now = min(entry_free_at, draft_done_at, flight[0][0] if flight else math.inf)
        if flight and flight[0][0] <= now:
            for node in flight.popleft()[1]:
                node.choice = text[node.position] if node.position < len(text) else VOID
            while tree.root.choice is not None and accepted < len(text):
                tree.advance(tree.root.choice)
                accepted += 1
                first_at = first_at or now
        elif draft_done_at <= now:
            drafted.finish()
            draft_done_at = now + draft_time
        elif run := tree.take_best(rows, rows, 0.0):
            flight.append((now + depth, run))
            entry_free_at = now + 1.0
        else:
            entry_free_at = min(draft_done_at, flight[0][0] if flight else math.inf)
    return (accepted - 1) / (now - first_at)


class Drafting:
    """The draft's passes over the leaves of ``tree``."""

    def __init__(self, tree: Tree, ranks: Sequence[float], draft_batch: int, max_ahead: int) -> None:
        self._tree, self._draft_batch, self._max_ahead = tree, draft_batch, max_ahead
        self._logps = [math.log(max(share, 1e-12)) for share in ranks]
        self._expanded: set[Node] = {tree.root}
        self._pass = [tree.root]

    def finish(self) -> None:
        """End a pass, and choose the leaves of the next one."""
        for node in self._pass:
            if node.alive and node.position >= self._tree.root.position:
                for token, logp in enumerate(self._logps):
                    self._tree.add(node, token, logp)
        self._pass = self._choose()
        self._expanded.update(self._pass)

    def _choose(self) -> list[Node]:
        chosen, ahead, serial = list[Node](), 0, 0
        heap = [(-self._tree.root.logp, serial, self._tree.root)]
        while heap and len(chosen) < self._draft_batch and ahead < self._max_ahead:
            _, _, node = heapq.heappop(heap)
            ahead += node.pending
            if node not in self._expanded:
                chosen.append(node)
            for child in node.children.values():
                serial += 1
                heapq.heappush(heap, (-child.logp, serial, child))
        return chosen


def best_chain(trip_s: Callable[[int], float], top1: float, draft_s: float, longest: int = 32) -> int:
    """The length of synchronous chains that gives most tokens per time, where a trip through the pipeline takes
    ``trip_s(rows)`` and a pass of the draft ``draft_s``."""

    return max(range(1, longest + 1), key=lambda length: chain_speed(trip_s, top1, draft_s, length))


def chain_speed(trip_s: Callable[[int], float], top1: float, draft_s: float, length: int) -> float:
    """Tokens per time of synchronous chains of ``length`` guesses, each right with ``top1`` if those before it are."""
    return sum(top1**level for level in range(length + 1)) / (trip_s(length + 1) + length * draft_s)


def best_tree(
    trip_s: Callable[[int], float], ranks: Sequence[float], draft_s: float, most_rows: int
) -> tuple[int, int]:
    """Draft passes and rows of the synchronous tree that gives most tokens per time, of at most ``most_rows`` rows."""
    heap, expected, levels, found = [(-1.0, 0)], 0.0, 0, []
    for rows in range(1, most_rows + 1):
        probability, level = heapq.heappop(heap)
        expected, levels = expected - probability, max(levels, level)
        found.append((expected / (trip_s(rows) + levels * draft_s), max(1, levels), rows))
        for share in ranks:
            heapq.heappush(heap, (probability * share, level + 1))
    _, passes, rows = max(found)
    return passes, rows
