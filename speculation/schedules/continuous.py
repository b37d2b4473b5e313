"""Continuous speculation: a run of the best unsent nodes is launched as soon as the first stage gives a credit.

    rows of a run = the k most probable unsent nodes, with k = argmax (u_1 + ... + u_k) / T(k) up to the gear's rows

u_i is the probability that row i is useful and T(k) the time of a pass of k rows (cost_curve.py). Without ``govern`` k
is the policy's ``max_rows``. A node in flight is never sent again. Credits arrive just in time (stages/stage/pacer.py),
so each run is chosen with the latest knowledge. The governor picks the gear: how many rows a run may have, and how many
leaves a draft pass evaluates. Plain decoding is the same schedule without drafts.

For several sequences many.py decides, or turns.py where all roles share one rank. Until passes are measured, and
without ``govern``, the nodes come from one heap (speculation/trees/forest.py), with ``balance`` at most
ceil(sequences / stages) roots a run. Governor and launch delay are for a sequence that is alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from speculation.schedules.alternation import Alternation
from speculation.schedules.cost_curve import NO_PRIORS, CostCurve, Priors
from speculation.schedules.governor import Gear, Governor
from speculation.schedules.launch_delay import LaunchDelay, Offer
from speculation.schedules.many import Many
from speculation.schedules.policy import Policy
from speculation.schedules.prospect import prospect
from speculation.schedules.schedule import ANY, UNLIMITED, Launch, Order, Placement, Situation, Step
from speculation.schedules.turns import Turns
from speculation.trees.forest import give_back, probabilities, take_best
from speculation.trees.tree import Node, Tree

RIGHT = 0.9
"""How often a draft's first choice is thought to be right before anything is known of it."""
LEAST_PROSPECT = 1.02
"""Speculation that can be no faster than this, beside plain decoding, is not begun with."""


class Continuous:
    """See Schedule."""

    most_sequences = ANY

    def __init__(
        self,
        policy: Policy,
        placement: Placement = "spread",
        priors: Priors = NO_PRIORS,
        right: float = RIGHT,
        stages: int = 1,
    ) -> None:
        """``right``: how often a draft's first choice is thought to be right, where priors are known."""
        self._policy = policy
        self._stages = stages
        self._is_alone = placement == "alone"
        is_governed = policy.govern and policy.speculate
        self._governor: Governor | None = None
        if is_governed:
            plain_s = CostCurve(priors.trips).seconds(1)
            pays = not plain_s or prospect(priors, placement, right, policy.max_rows) > LEAST_PROSPECT
            self._governor = Governor(policy.max_rows, placement == "oversubscribed", priors.rows, plain_s, pays)
        self._delay: LaunchDelay | Alternation | None = None
        if policy.launch_delay and is_governed:
            pass_s = CostCurve(priors.drafts).seconds(1) or None
            self._delay = Alternation(pass_s, right) if placement == "alone" else LaunchDelay(pass_s)
        self._many: Many | None = None
        self._taking_turns: Turns | None = None
        if self._governor:
            drafts = CostCurve(priors.drafts)
            pass_s = drafts.seconds(1) or None
            if self._is_alone:
                self._taking_turns = Turns(policy, self._governor.curve, pass_s, right)
            else:
                self._many = Many(policy, stages, self._governor.curve, pass_s, right, drafts if pass_s else None)
        self._ordered: int | None = None  # leaves per draft pass in the last standing order
        self._sequences = 0  # that are open
        self._silenced: set[int] = set()  # sequences that drafters were told not to draft for without an order
        self._drafting: set[int] = set()  # sequences whose order of one pass is not done
        self._unordered: list[int] = []  # sequences whose order of one pass has not been given
        self._launches = 0
        self._turns: dict[int, int] = {}  # by sequence the last launch with its root: who waited longest goes first

    @property
    def guesses(self) -> bool:
        """See Schedule."""
        return self._sequences > 1 or self._governor is None or self._governor.gear.rows > 0

    def opened(self, tree: Tree) -> None:
        """See Schedule."""
        self._sequences += 1
        self._reset()

    def closed(self, tree: Tree) -> None:
        """See Schedule."""
        self._sequences -= 1
        self._drafting.discard(tree.sequence)
        self._silenced.discard(tree.sequence)
        self._turns.pop(tree.sequence, None)
        if self._many:
            self._many.closed(tree)
            if self._sequences <= 1:
                self._many.pause()
        if self._taking_turns:
            self._taking_turns.closed(tree)
        if self._sequences:
            self._reset()

    def _reset(self) -> None:
        """What was measured of one sequence is over."""
        self._ordered = None
        if self._delay:
            self._delay.opened()
        if self._governor:
            self._governor.opened()

    def next(self, now: Situation) -> Step | None:
        """See Schedule."""
        return self._next_of_one(now) if self._sequences == 1 else self._next_of_many(now)

    def _next_of_many(self, now: Situation) -> Step | None:
        while self._unordered:
            sequence = self._unordered.pop()
            if any(tree.sequence == sequence for tree in now.trees):
                self._drafting.add(sequence)
                return Order(1, draft_batch=self._policy.draft_batch, sequence=sequence)
        if self._drafting:
            return None
        if self._many and (order := self._many.order(now)):
            return order
        for tree in now.trees if self._taking_turns and len(self._silenced) < len(now.trees) else ():
            if tree.sequence not in self._silenced:
                self._silenced.add(tree.sequence)
                return Order(0, sequence=tree.sequence)
        if now.slots <= 0 or now.credits <= 0:
            return None
        if self._governor and self._governor.curve.seconds(1):
            return self._many.next(now) if self._many else self._next_on_one_rank(now)
        roots = min(now.root_room, -(-len(now.trees) // self._stages) if self._policy.balance else ANY)
        most = max(min(roots, len(now.trees)), self._policy.max_rows)
        curve = self._governor.curve if self._governor else None
        guesses = now.room if self._policy.speculate else 0
        least = curve.least_probability(most, self._policy.min_path_prob) if curve else self._policy.min_path_prob
        in_turn = sorted(now.trees, key=lambda tree: self._turns.get(tree.sequence, 0))
        nodes = take_best(in_turn, most, roots, guesses, least)
        if not nodes:
            return None
        trees = {tree.sequence: tree for tree in now.trees}
        known = [node.sequence for node in nodes if node is trees[node.sequence].root]
        self._launches += 1
        self._turns.update(dict.fromkeys(known, self._launches))
        if curve:
            certain = len(known)
            count = max(certain, curve.best_count(probabilities(trees, nodes)))
            give_back(trees, nodes[count:])
            del nodes[count:]
        return Launch(nodes)

    def _next_on_one_rank(self, now: Situation) -> Step | None:
        assert self._taking_turns
        nodes = self._taking_turns.next(now)
        if nodes is None:
            self._unordered = [tree.sequence for tree in now.trees]  # not those whose prompts are on their way
            return self._next_of_many(now)
        return Launch(nodes) if nodes else None

    def _next_of_one(self, now: Situation) -> Step | None:
        governor = self._governor
        gear = governor.gear if governor else Gear(self._policy.max_rows)
        # A chain needs one leaf per draft pass, a wide tree as many as the policy allows.
        draft_batch = min(self._policy.draft_batch, gear.rows) if governor else self._policy.draft_batch
        delay = self._delay
        if self._drafting and not (delay and delay.is_on(now.now)):
            return None  # an order from when there were more sequences
        unasked = 0 if delay and not delay.drafts_unasked else draft_batch
        awaits_drafts = self._many is not None and self._many.awaits_drafts  # from when there were more sequences
        if governor and unasked != self._ordered and not awaits_drafts:
            self._ordered = unasked
            self._silenced.clear()  # it goes to all
            if self._many:
                self._many.pause()
            return Order(UNLIMITED, draft_batch=unasked) if unasked else Order(0)
        if delay:
            delay.look(now.tree, now.now)
        # A new root is certain and needs no credit: the rejected work before it is already cancelled.
        if now.slots <= 0 or (now.credits <= 0 and not now.tree.root.pending):
            return None
        if 0 < gear.runs <= now.in_flight:
            return None
        if delay and delay.is_on(now.now):
            return None
        if not self.guesses or governor is None:
            nodes = choose_rows(now.tree, self._policy, now.room if governor is None else 0)
            return Launch(nodes) if nodes else None
        nodes = choose_rows(now.tree, self._policy, now.room, gear.rows, governor.curve)
        if nodes and gear.rows > 1 and delay and not awaits_drafts:
            step = delay.instead(Offer(now.tree, nodes, governor.curve, gear.rows, draft_batch, now.now))
            if step:
                now.tree.give_back(nodes)
                if isinstance(step, Order):
                    self._drafting.add(now.tree.sequence)
                return step
        return Launch(nodes) if nodes else None

    def drafted(self, tree: Tree, nodes: list[Node]) -> None:
        """See Schedule."""
        self._drafting.discard(tree.sequence)
        if self._many:
            self._many.drafted(tree)
        if self._delay and self._sequences == 1:
            self._delay.drafted()

    def accepted(self, tree: Tree, tokens: int, now: float) -> str:
        """See Schedule."""
        if self._sequences > 1:
            if self._many:
                self._many.accepted(tokens, self._sequences, now)
            if self._taking_turns:
                self._taking_turns.accepted(tree, now)
            return ""
        if self._delay:
            self._delay.accepted(tokens)
        return self._governor.accepted(tokens, now) if self._governor else ""

    def computed(self, rows: int, seconds: float) -> None:
        """See Schedule."""
        if self._governor:
            self._governor.curve.expect(rows, seconds)

    def returned(self, rows: int, slowest_s: float | None, trip_s: float, carries_root: bool) -> None:
        """See Schedule."""
        if self._governor:
            self._governor.returned(rows, slowest_s, trip_s, carries_root)
        if self._many and slowest_s is not None:
            self._many.returned(slowest_s)

    def restarts(self, accepted: Sequence[Node]) -> bool:
        """See Schedule: without ``reuse``, whenever the draft's first choice was wrong."""
        return not self._policy.reuse and any(node.source is None or node.rank for node in accepted)

    def defers_results(self, now: Situation) -> bool:
        """See Schedule."""
        return False


def choose_rows(
    tree: Tree, policy: Policy, room: int, most: int | None = None, curve: CostCurve | None = None
) -> list[Node]:
    """Take the nodes of the next run from ``tree``, best first, parents before children: at most ``most`` (default:
    ``policy.max_rows``), and no more drafted nodes than there are KV slots (``room``).

    An unsent root is always taken. A drafted node is taken if its path probability is worth a row by ``curve`` (without
    a curve: at least ``policy.min_path_prob``). With a curve, the number of rows maximises useful rows per second."""
    most, min_path_prob = policy.max_rows if most is None else most, policy.min_path_prob
    if curve:
        most = min(most, curve.reach)
        min_path_prob = curve.least_probability(most, min_path_prob)
    chosen = tree.take_best(most, room if policy.speculate else 0, min_path_prob)
    if curve:
        count = curve.best_count(tree.probabilities(chosen))
        tree.give_back(chosen[count:])
        del chosen[count:]
    return chosen
