"""Continuous speculation: the target gets as much as its first stage takes, at any time, best first.

Plain decoding is the case without guesses. Runs leave just in time (stages/stage/pacer.py), so each is chosen from all
that is known by then, and what is in flight is never sent again. With ``govern`` a governor says how many rows a run
may have and how much drafters do, and within that as many go as give the most useful rows per second.
"""

from __future__ import annotations

from speculation.schedules.alternation import Alternation
from speculation.schedules.cost_curve import CostCurve
from speculation.schedules.governor import Gear, Governor
from speculation.schedules.launch_delay import LaunchDelay, Offer
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import UNLIMITED, Launch, Order, Placement, Situation, Step
from speculation.trees.tree import Node, Tree


class Continuous:
    """See Schedule."""

    def __init__(self, policy: Policy, placement: Placement = "spread") -> None:
        self._policy = policy
        is_governed = policy.govern and policy.speculate
        self._governor = Governor(policy.max_rows, placement == "oversubscribed") if is_governed else None
        self._hold: LaunchDelay | Alternation | None = None
        if policy.launch_delay and is_governed:
            self._hold = Alternation() if placement == "alone" else LaunchDelay()
        self._ordered: int | None = None  # how many leaves at a time drafters were last told to take unasked

    def opened(self) -> None:
        """See Schedule."""
        self._ordered = None
        if self._hold:
            self._hold.opened()
        if self._governor:
            self._governor.opened()

    def next(self, now: Situation) -> Step | None:
        """See Schedule."""
        governor = self._governor
        gear = governor.gear if governor else Gear(self._policy.max_rows)
        # A chain wants one leaf at a time, a wide tree as many as the policy allows.
        leaves = min(self._policy.draft_batch, gear.rows) if governor else self._policy.draft_batch
        hold = self._hold
        unasked = 0 if hold and not hold.drafts_unasked else leaves
        if governor and unasked != self._ordered:
            self._ordered = unasked
            return Order(UNLIMITED, draft_batch=unasked) if unasked else Order(0)
        if hold:
            hold.look(now.tree, now.now)
        # A new root is certain and needs no credit: what dead work still holds does not concern it.
        if now.slots <= 0 or (now.credits <= 0 and not now.tree.root.pending):
            return None
        if 0 < gear.runs <= now.in_flight:
            return None
        if governor is None:
            nodes = choose_rows(now.tree, self._policy, now.room)
            return Launch(nodes) if nodes else None
        if hold and hold.is_on(now.now):
            return None
        rows = max(1, gear.rows)
        nodes = choose_rows(now.tree, self._policy, now.room if gear.rows else 0, rows, governor.curve)
        if nodes and rows > 1 and hold:
            step = hold.instead(Offer(now.tree, nodes, governor.curve, rows, leaves, now.now))
            if step:
                now.tree.give_back(nodes)
                return step
        return Launch(nodes) if nodes else None

    def drafted(self, nodes: list[Node]) -> None:
        """See Schedule."""
        if self._hold:
            self._hold.drafted()

    def accepted(self, tokens: int, now: float) -> str:
        """See Schedule."""
        if self._hold:
            self._hold.accepted(tokens)
        return self._governor.accepted(tokens, now) if self._governor else ""

    def computed(self, rows: int, seconds: float) -> None:
        """See Schedule."""
        if self._governor:
            self._governor.curve.expect(rows, seconds)

    def returned(self, rows: int, slowest_s: float | None, trip_s: float, carries_root: bool) -> None:
        """See Schedule."""
        if self._governor:
            self._governor.returned(rows, slowest_s, trip_s, carries_root)

    def defers_results(self, now: Situation) -> bool:
        """See Schedule."""
        return False


def choose_rows(
    tree: Tree, policy: Policy, room: int, most: int | None = None, curve: CostCurve | None = None
) -> list[Node]:
    """Take the nodes of the next run, best first, parents before children: at most ``most`` (the policy's ``rows``),
    and no more guesses than there are slots (``room``).

    The root is no guess and always goes. A guess goes if its path is probable enough for what a row costs by the
    ``curve`` (without one: ``policy.floor``), and as many go as give the most useful rows per second."""
    most, floor = policy.max_rows if most is None else most, policy.min_path_prob
    if curve:
        most = min(most, curve.reach)
        floor = curve.least_probability(most, floor)
    chosen = tree.take_best(most, room if policy.speculate else 0, floor)
    if curve:
        count = curve.best_count(tree.probabilities(chosen))
        tree.give_back(chosen[count:])
        del chosen[count:]
    return chosen
