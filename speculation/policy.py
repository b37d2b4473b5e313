"""Policies: what to send to the target next. Plain decoding is the policy that never guesses."""

from __future__ import annotations

from dataclasses import dataclass

from pipeinfer.protocol import MAX_ROWS
from speculation.tree import Node, Tree


@dataclass(frozen=True, slots=True)
class Policy:
    """Every decision a user may turn; names are the field's.

    A run carries at most ``rows`` tree nodes. The drafter evaluates up to ``leaves`` nodes per pass, proposes ``width``
    children for each, and stays at most ``lead`` evaluated nodes ahead of the accepted text.
    """

    name: str
    speculate: bool = True
    rows: int = 1
    width: int = 1
    leaves: int = 1
    lead: int = 0
    window: int = 0  # most runs in flight; 0 means two per stage and two more
    floor: float = 0.0  # least path probability that is worth a row
    cancel: str = "direct"  # "direct": to every stage at once; "relay": backwards, stage to stage; "off"
    prefill_chunk: int = 128  # prompt tokens per run

    def __post_init__(self) -> None:
        for what in ("rows", "width", "leaves", "prefill_chunk"):
            if not 1 <= getattr(self, what) <= MAX_ROWS:
                raise ValueError(f"policy {self.name}: {what} must be 1 to {MAX_ROWS}, not {getattr(self, what)}")
        if self.leaves * self.width > MAX_ROWS:
            raise ValueError(f"policy {self.name}: leaves x width must be at most {MAX_ROWS}")
        if self.lead < 0 or self.window < 0 or not 0 <= self.floor <= 1:
            raise ValueError(f"policy {self.name}: lead and window must not be negative, floor must be a probability")
        if self.cancel not in ("direct", "relay", "off"):
            raise ValueError(f"policy {self.name}: cancel must be direct, relay or off, not {self.cancel!r}")

    def most_nodes(self) -> int:
        """A bound on the living nodes of one drafter's tree."""
        return (self.lead + self.leaves + 1) * (self.width + 1) + 1

    def most_runs(self, stages: int) -> int:
        """A bound on the runs in flight over ``stages`` stages."""
        return self.window or 2 * stages + 2


PLAIN = Policy("plain", speculate=False)
CONTINUOUS = Policy("continuous", rows=4, width=2, leaves=2, lead=32, floor=0.02)
POLICIES = {policy.name: policy for policy in (PLAIN, CONTINUOUS)}


def choose_rows(tree: Tree, policy: Policy, room: int) -> list[Node]:
    """Take the nodes of the next run, best first, parents before children; ``room`` is how many guesses have cells.

    The root is no guess and always goes; a guess goes if its path is probable enough (``policy.floor``)."""
    chosen: list[Node] = []
    while len(chosen) < policy.rows:
        node = tree.best()
        if node is None:
            break
        if node is not tree.root:
            if not policy.speculate or room == 0 or tree.probability(node) < policy.floor:
                break
            room -= 1
        tree.take(node)
        chosen.append(node)
    return chosen
