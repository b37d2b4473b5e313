"""Two models of a pipeline that serves many requests: the reference for schedules of many requests.

    cohorts    synchronous speculation by chains of the best length L, closed-form. C = min(A, S) cohorts of n requests:
               A E(L) / max(S T(n (L + 1)) + L d(n), C L d(n)),  E(L) = 1 + g + ... + g^L
    heap       all nodes of all requests in one heap by path probability. A run takes the rows that are worth most
               beyond their time: sum(p) - price G T(r), with G the tokens per second reached so far; known tokens
               always go, at most ceil(A / S) in a run. Simulated, at the best of PRICES.

Cancelling and messages cost nothing, prompts are not served, and the draft knows each child's probability. The
reference is the better of both: a strong one, not a proven optimum.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate

from speculation.trees.forest import give_back, probabilities, take_best
from speculation.trees.tree import Node, Tree

PRICES = (0.5, 1.0, 1.5, 2.0, 3.0)
LONGEST = 16
MOST_ROWS, MOST_LEAVES = 64, 32
LEAST = 0.01
"""Less probable nodes are not looked at."""
LIMIT = 1 << 30
WARM_TOKENS, TOKENS = 8, 16
"""Tokens of a request before and while the speed is measured; and MORE of all requests."""
MORE = 300
NONE = -1
"""The target's choice where no choice of the draft is right."""

Pass = Callable[[int], float]
"""Seconds of a pass by its rows."""


def cohorts(stages: int, requests: int, top1: float, run_s: Pass, draft_s: Pass) -> float:
    """Tokens per second of synchronous cohorts; without drafts if that is quicker."""
    groups = min(requests, stages)
    size = -(-requests // groups)
    best = requests / (stages * run_s(size))
    tokens = 1.0
    for length in range(1, LONGEST + 1):
        tokens += top1**length
        drafts_s = length * draft_s(size)
        round_s = max(stages * run_s(size * (length + 1)) + drafts_s, groups * drafts_s)
        best = max(best, requests * tokens / round_s)
    return best


class Heap:
    """The second model: ``requests`` requests over ``stages`` stages; the draft's k-th choice is right with
    ``ranks[k]``."""

    def __init__(
        self, stages: int, requests: int, ranks: Sequence[float], run_s: Pass, draft_s: Pass, price: float
    ) -> None:
        self._run_s, self._draft_s, self._price = run_s, draft_s, price
        self._logps = [math.log(max(share, 1e-12)) for share in ranks]
        self._totals = list(accumulate(ranks))
        self._trees = [Tree(NONE, 0, LIMIT, sequence) for sequence in range(requests)]
        self._leaves = [Tree(NONE, 0, LIMIT, sequence) for sequence in range(requests)]  # taken when drafted
        self._by_sequence = dict(enumerate(self._trees))
        self._leaves_by_sequence = dict(enumerate(self._leaves))
        self._free_at = [0.0] * stages
        self._flight: deque[tuple[float, list[Node]]] = deque()
        self._pass: list[Node] = []
        self._pass_ends = math.inf
        self._rate = requests / (stages * run_s(-(-requests // stages)))
        self._most_known = -(-requests // stages)
        self._random = random.Random(1)

    def speed(self) -> float:
        """Tokens per second."""
        requests = len(self._trees)
        warm, most = WARM_TOKENS * requests + MORE, (WARM_TOKENS + TOKENS) * requests + 2 * MORE
        now = began = 0.0
        emitted = before = 0
        while emitted < most:
            if self._pass_ends == math.inf:
                self._draft(now)
            returns = self._flight[0][0] if self._flight else math.inf
            now = max(now, min(self._free_at[0], returns, self._pass_ends))
            if returns <= now:
                emitted += self._judge(self._flight.popleft()[1])
                if emitted >= warm and not before:
                    began, before = now, emitted
                if emitted > warm / 2:
                    self._rate = max(self._rate, emitted / now)
            elif self._pass_ends <= now:
                self._grow()
            elif not self._launch(now):
                self._free_at[0] = min(returns, self._pass_ends)
        return (emitted - before) / (now - began)

    def _best(self, useful: Sequence[float], price: float, pass_s: Pass) -> int:
        worths = [0.0, *(total - price * pass_s(rows) for rows, total in enumerate(accumulate(useful), 1))]
        return worths.index(max(worths))

    def _launch(self, now: float) -> bool:
        nodes = take_best(self._trees, MOST_ROWS, self._most_known, MOST_ROWS, LEAST)
        useful = probabilities(self._by_sequence, nodes)
        known = sum(node is self._trees[node.sequence].root for node in nodes)
        count = max(known, self._best(useful, self._price * self._rate, self._run_s))
        give_back(self._by_sequence, nodes[count:])
        if not count:
            return False
        at, taken_s = now, self._run_s(count)
        for stage, free_at in enumerate(self._free_at):
            at = self._free_at[stage] = max(at, free_at) + taken_s
        self._flight.append((at, nodes[:count]))
        return True

    def _judge(self, nodes: Sequence[Node]) -> int:
        emitted = 0
        for node in nodes:
            if node.alive:
                node.choice = bisect_right(self._totals, self._random.random())
        for tree in {self._by_sequence[node.sequence] for node in nodes}:
            while tree.root.choice is not None:
                token = tree.root.choice if tree.root.choice < len(self._totals) else NONE
                tree.advance(token)
                self._leaves[tree.sequence].advance(token)
                emitted += 1
        return emitted

    def _draft(self, now: float) -> None:
        """Begin a pass over the best leaves."""
        leaves = take_best(self._leaves, MOST_LEAVES, MOST_LEAVES, MOST_LEAVES, LEAST)
        useful = probabilities(self._leaves_by_sequence, leaves)
        count = max(min(1, len(leaves)), self._best(useful, self._price * self._rate, self._draft_s))
        give_back(self._leaves_by_sequence, leaves[count:])
        self._pass = leaves[:count]
        self._pass_ends = now + self._draft_s(count) if count else now + self._run_s(1)

    def _grow(self) -> None:
        """End a pass: children in both trees."""
        for leaf in self._pass:
            if leaf.alive and leaf.position >= self._leaves[leaf.sequence].root.position:
                node = self._twin(leaf)
                for token, logp in enumerate(self._logps):
                    self._leaves[leaf.sequence].add(leaf, token, logp)
                    if node is not None:
                        self._trees[leaf.sequence].add(node, token, logp)
        self._pass, self._pass_ends = [], math.inf

    def _twin(self, leaf: Node) -> Node | None:
        """The node of the tree of runs that stands for ``leaf``."""
        path, root = list[int](), self._leaves[leaf.sequence].root
        while leaf is not root and leaf.parent is not None:
            path.append(leaf.token)
            leaf = leaf.parent
        node: Node | None = self._trees[root.sequence].root
        for token in reversed(path):
            node = node.children.get(token) if node is not None else None
        return node


def reference(stages: int, requests: int, ranks: Sequence[float], run_s: Pass, draft_s: Pass) -> float:
    """Tokens per second of the better one of both models."""
    heaps = [Heap(stages, requests, ranks, run_s, draft_s, price).speed() for price in PRICES]
    return max(cohorts(stages, requests, ranks[0], run_s, draft_s), *heaps)
