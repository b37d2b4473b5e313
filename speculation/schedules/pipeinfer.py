"""PipeInfer's schedule as its published code has it (SC'24, arXiv 2407.11798; v1.1.1), on our engine.

What the code decides, and so do we:

- After every verification the newest token goes out as a run of its own (*canonical*), even if it is in flight already.
- Speculation then starts again at that token; what is drafted anew goes out anew, in flight or not.
- Micro-batches of up to ``rows`` tokens follow, each continuing the one before, while nothing comes back; a token less
  probable than ``p_accept + launched * p_recovery - refused * p_decay`` ends one. ``launched`` starts at 0 on every
  entry into that loop, ``refused`` with every verification.
- Drafting and the first stage's layers never overlap, and a result that arrives during either waits for their end.
- Canonical runs are never cancelled; speculative ones are, as a whole, backwards from stage to stage.

What we leave out, all of it in its favour: metadata messages, logits and full-size tensors of cancelled runs on the
wire, and the draft model's pass over the last token of each micro-batch before it is sent. Trees: the published
settings of ``p_split`` (0.8 and 0.9) only ever give chains, as no second choice is that probable; we have chains only.
Where a superfluous run still has descendants in flight it is our slots that keep them right, not a recomputation.
"""

from __future__ import annotations

from speculation.schedules.policy import Policy
from speculation.schedules.schedule import Launch, Order, Situation, Step
from speculation.trees.tree import Node


class PipeInfer:
    """See Schedule; the roots' lock-step is in ``defers_results``."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.opened()

    def opened(self) -> None:
        """See Schedule."""
        self._has_begun = False  # nothing is drafted before the first token is there
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
            self._launched = 0  # whatever came back, the loop was left for it
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
            return None  # slots come back with the next result
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
            # The loop is left and entered again, so that what recovery added is gone.
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

    def drafted(self, nodes: list[Node]) -> None:
        """See Schedule."""
        self._is_drafting = False
        self._batch = []
        for node in sorted(dict.fromkeys(nodes), key=lambda node: node.position):
            parent = node.parent  # several drafters may have found the same chain, or ends of others
            is_rooted = parent is not None and (not parent.pending or parent in self._batch)
            if node.alive and is_rooted and len(self._batch) < self._policy.max_rows:
                self._batch.append(node)
        self._is_refused = not self._batch

    def computed(self, rows: int, seconds: float) -> None:
        """See Schedule."""

    def returned(self, rows: int, slowest_s: float | None, trip_s: float, carries_root: bool) -> None:
        """See Schedule."""

    def accepted(self, tokens: int, now: float) -> str:
        """See Schedule."""
        self._has_begun = self._owes_canonical = self._owes_restart = True
        self._is_refused = False
        self._launched = self._refused = 0
        self._batch = []
        return ""

    def defers_results(self, now: Situation) -> bool:
        """See Schedule."""
        if self._is_drafting or now.credits <= 0:
            return True
        # What has been verified and drafted is launched first, if it can be.
        owes = self._owes_canonical and (now.tree.root.pending or now.room > 0)
        return now.slots > 0 and (owes or 0 < len(self._batch) <= now.room)
