"""PipeInfer's schedule as in its published code (SC'24, arXiv 2407.11798; v1.1.1), on our engine.

    cutoff = p_accept + launched * p_recovery - refused * p_decay

    launched   runs launched without a result since the last entry into the drafting loop
    refused    micro-batches without a token above the cutoff since the last verification

Decisions that this schedule shares with the published code:

- After every verification the newest token goes out as a run of its own (*canonical*), even if a run in flight holds
  this token.
- Speculation then restarts at that token. Tokens that are drafted again are sent again, in flight or not.
- Micro-batches of up to ``max_rows`` tokens follow, each continuing the one before, while no result arrives. A token
  with a probability below the cutoff ends a micro-batch.
- Drafting and the first stage's layers never overlap. A result that arrives during either waits for its end.
- Canonical runs are never cancelled. Speculative runs are cancelled whole, backwards from stage to stage.

Omitted, in the schedule's favour: metadata messages, logits and full-size tensors of cancelled runs, and a draft pass
over the last token of each micro-batch before it is sent. Trees are omitted too: the published settings of ``p_split``
(0.8 and 0.9) only give chains, because no second choice is that probable. If a superfluous run still has descendants in
flight, our KV slots keep the descendants correct without recomputation.
"""

from __future__ import annotations

from collections.abc import Sequence

from speculation.schedules.policy import Policy
from speculation.schedules.schedule import Launch, Order, Situation, Step
from speculation.trees.tree import Node, Tree


class PipeInfer:
    """See Schedule; ``defers_results`` makes results wait for drafting and for the first stage."""

    guesses = True
    most_sequences = 1

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._reset()

    def opened(self, tree: Tree) -> None:
        """See Schedule."""
        self._reset()

    def closed(self, tree: Tree) -> None:
        """See Schedule."""

    def _reset(self) -> None:
        self._has_begun = False  # nothing is drafted before the first token is accepted
        self._owes_canonical = self._owes_restart = False
        self._is_drafting = self._is_refused = False
        self._launched = self._refused = 0
        self._in_flight = 0  # runs, after the last step
        self._batch: list[Node] = []

    def next(self, now: Situation) -> Step | None:
        """See Schedule."""
        if not self._has_begun or self._is_drafting or now.credits <= 0 or now.slots <= 0:
            return None
        if now.in_flight < self._in_flight:
            self._launched = 0  # any result leaves the drafting loop
        self._in_flight = now.in_flight
        if self._owes_canonical:
            self._owes_canonical = False
            if now.tree.root.pending or now.room:
                return self._canonical(now)
        if self._batch:
            return self._speculative(now)
        return self._order()

    def _canonical(self, now: Situation) -> Launch:
        root = now.tree.root
        self._in_flight += 1
        if not root.pending:
            return Launch([], [root], is_canonical=True)
        now.tree.take(root)
        return Launch([root], is_canonical=True)

    def _speculative(self, now: Situation) -> Launch | None:
        if now.room < len(self._batch):
            return None  # the next result frees slots
        batch, self._batch = self._batch, []
        nodes = [node for node in batch if node.pending]
        for node in nodes:
            now.tree.take(node)
        self._launched += 1
        self._in_flight += 1
        return Launch(nodes, [node for node in batch if node not in nodes])

    def _order(self) -> Order | None:
        policy = self._policy
        if self._is_refused:
            # The loop is left and entered again, which resets ``launched``.
            if (self._launched == 0 and policy.p_decay == 0) or self._cutoff() <= 0:
                return None
            self._launched = 0
            self._refused += 1
            self._is_refused = False
        if self._cutoff() >= 1:
            self._launched = 0
            if self._cutoff() >= 1:
                return None
        self._is_drafting = True
        restart, self._owes_restart = self._owes_restart, False
        return Order(policy.max_rows, max(0.0, self._cutoff()), restart)

    def _cutoff(self) -> float:
        policy = self._policy
        return policy.p_accept + self._launched * policy.p_recovery - self._refused * policy.p_decay

    def drafted(self, tree: Tree, nodes: list[Node]) -> None:
        """See Schedule."""
        self._is_drafting = False
        self._batch = []
        for node in sorted(dict.fromkeys(nodes), key=lambda node: node.position):
            parent = node.parent  # several drafters may find the same chain, or parts of it
            is_rooted = parent is not None and (not parent.pending or parent in self._batch)
            if node.alive and is_rooted and len(self._batch) < self._policy.max_rows:
                self._batch.append(node)
        self._is_refused = not self._batch

    def computed(self, rows: int, seconds: float) -> None:
        """See Schedule."""

    def returned(self, rows: int, slowest_s: float | None, trip_s: float, carries_root: bool) -> None:
        """See Schedule."""

    def accepted(self, tree: Tree, tokens: int, now: float) -> str:
        """See Schedule."""
        self._has_begun = self._owes_canonical = self._owes_restart = True
        self._is_refused = False
        self._launched = self._refused = 0
        self._batch = []
        return ""

    def restarts(self, accepted: Sequence[Node]) -> bool:
        """See Schedule: its orders say so."""
        return False

    def defers_results(self, now: Situation) -> bool:
        """See Schedule."""
        if self._is_drafting or now.credits <= 0:
            return True
        # A canonical run or a micro-batch that can be launched comes first.
        owes = self._owes_canonical and (now.tree.root.pending or now.room > 0)
        return now.slots > 0 and (owes or 0 < len(self._batch) <= now.room)
