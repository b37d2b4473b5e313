"""Many sequences in one pipeline: which rows of which sequences leave together, and which wait.

A known token that has not been sent is an unsent root. There are two ways to decode many sequences. *In cohorts* a
root waits for L levels that are drafted for it alone, and leaves with n - 1 others; no sequence is drafted for while it
is in flight (cohorts.py has n and L, and V, what they earn). *Ahead* of verification drafters never stop, and the rules
below say what leaves. Cohorts are better where roots keep the stages busy and rows are dear: a level is drafted in one
short pass, and what is drafted in flight mostly dies. With L = 0 they are plain decoding. Running ahead is better where
stages would idle, rows are cheap or drafts slow. trial.py measures which one earns more, beside V.

Ahead, a stage should always have work, a run should hold many roots with the rows of their trees, and all runs should
be equally long: over S stages a run that is longer than those behind it holds each of them up at every stage. For A
sequences, with G, mu, c, eta, sigma, k, m of traffic.py, T(r) of cost_curve.py, and w of drafting.py, where G is at
least V, or the share of V that cohorts were seen to earn:

    cohort     a run has at most K roots, K = argmax over n of min(n, q) / T(n m) with q = A / (S + D)
               D = 2 wait / c: while S cohorts are in flight, others are drafted for
    price      pi = G max(1, K S / A), tokens per second of a run with roots; s = pi (T(2 n) - T(n)) / n, of one more
               row, n = max(4, 4 K)
    ready      an unsent root leaves with what its tree has, unless
               min(g p, s / (1 - sigma) + g p mu c / 2, F(2)) - s  >  w mu
               with p the path probability of its best undrafted node and g that of a first choice: on the left what the
               next level is worth in the same run, at most what it costs to send it later; on the right what the
               sequence loses in w
    roots      of ready roots the K that have waited longest, with the rows of their trees that are worth most:
               argmax over r of sum(p) - pi T(r), but T(r) <= LONGEST c
    piggyback  guesses of other sequences are added where rows are nearly free:
               argmax over n of sum(p) - PIGGYBACK pi (T(r + n) - T(r)) / (1 - sigma)
    guess run  if no root is unsent, guesses leave alone: argmax over r of sum(p) / (T(r) + eta X^2 / 2) where
               sum(p) > F(r)
               X(r) = max(T(r), S (T(r) - c) + c), the time for which such a run may hold up one with roots behind it
               F(r) = eta k mu X^2 / 2 + GUESS_RUN G T(r) / (1 - sigma)

Either way a run with fewer roots than it may have waits for others, as long as it saves to send one more root in it:
T(r) + T(r / n) - T(r + r / n), and no longer than the last run took, as T may be far off at first. And where W further
sequences have prompts of which a part waits, each row makes their first tokens later too: then pi is 1 + W / A times as
high, guesses leave with their roots only, and a cohort leaves without its levels unless
n (E(L) - 1) > pi (T(n (L + 1)) - T(n)).

Ahead, where roots keep the stages busy, sigma is near 1: a guess leaves in the run of its root or not at all, since its
ancestors will be known when the next root leaves. Where they do not, guess runs go ahead as for one sequence. Found by
simulation, see docs/log.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from speculation.schedules.cohorts import Orders, Plan, plan
from speculation.schedules.cost_curve import CostCurve
from speculation.schedules.drafting import Drafting
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import Launch, Order, Situation, Wait
from speculation.schedules.traffic import Traffic
from speculation.schedules.trial import Trial
from speculation.trees.forest import give_back, probabilities, take_best
from speculation.trees.tree import Node, Tree

PIGGYBACK = 2.0
"""Multiple of a row's price that a guess of a sequence in flight has to be worth: it might wait, and cost nothing if
its ancestors are wrong."""
GUESS_RUN = 0.25
"""Share of the rate G that a run of guesses has to earn where the stages are idle otherwise."""
LONGEST = 1.1
"""A run with roots takes at most this multiple of the mean one, unless its roots alone take longer."""
ROWS = 4
"""Rows of a root's tree by which the price of a row is estimated."""


class Many:
    """Decides for several sequences. ``curve``: T(r); ``pass_s``, ``right``: see Drafting."""

    def __init__(
        self,
        policy: Policy,
        stages: int,
        curve: CostCurve,
        pass_s: float | None = None,
        right: float = 0.5,
        drafts: CostCurve | None = None,
    ) -> None:
        self._policy = policy
        self._stages = stages
        self._curve = curve
        self._drafting = Drafting(pass_s, right)
        self._draft_curve = drafts
        self._orders = Orders(policy.draft_batch)
        self._trial = Trial()
        self._plan: Plan | None = None
        self._plan_is_of = 0, 0  # sequences, and roots that may leave before there is a new plan
        self._traffic: Traffic | None = None
        self._count = 1  # A
        self._prompts = 0  # W
        self._earns = 0.0  # G
        self._wanted = 1  # rows that the last run with roots would have had
        self._launches = 0  # runs with roots so far, of which the first ones fill the stages
        self._roots: dict[int, Node] = {}  # the last one seen of each sequence
        self._since: dict[int, float] = {}  # when it became known
        self._ready_at: dict[int, float] = {}  # when an unsent one was ready first
        self._measured_s = 0.0  # what the last run took at the slowest stage
        self._held_since: float | None = None  # when a run that might have had more roots might have left
        self._until = 0.0  # of the last Wait
        self._is_waiting = False

    def pause(self) -> None:
        """There are no several sequences any more."""
        self._traffic, self._held_since, self._until, self._is_waiting, self._launches = None, None, 0.0, False, 0
        self._orders.forget()
        self._trial.pause()

    def closed(self, tree: Tree) -> None:
        """The sequence of ``tree`` is over."""
        for kept in (self._roots, self._since, self._ready_at):
            kept.pop(tree.sequence, None)
        self._drafting.closed(tree.sequence)
        self._orders.closed(tree.sequence)

    def drafted(self, tree: Tree) -> None:
        """An order for ``tree`` is done."""
        self._orders.drafted(tree.sequence)

    @property
    def awaits_drafts(self) -> bool:
        """Whether an order is not done yet."""
        return self._orders.is_awaited

    def accepted(self, tokens: int, sequences: int, now: float) -> None:
        """``tokens`` tokens of one of ``sequences`` sequences were emitted."""
        if self._traffic:
            self._traffic.accepted(tokens, sequences, now)

    def returned(self, slowest_s: float) -> None:
        """A run took ``slowest_s`` at the slowest stage."""
        self._measured_s = slowest_s

    def order(self, now: Situation) -> Order | None:
        """The next order for drafters. It needs no credit."""
        if self._policy.speculate and self._trial.in_cohorts and self._curve.seconds(1):
            return self._orders.of_levels(now.trees, self._planned(len(now.trees)), now.now)
        return self._orders.without_end(now.trees)

    def _planned(self, count: int) -> Plan:
        """The best cohorts of ``count`` sequences; a plan holds until every root has left once."""
        of, left = self._plan_is_of
        if self._plan is None or of != count or left <= 0:
            drafting, curve = self._drafting, self._draft_curve
            draft_s = curve.seconds if curve else lambda rows: drafting.pass_s
            guesses = self._policy.max_rows if self._policy.speculate and draft_s(1) > 0 else 0
            self._plan = plan(count, self._stages, drafting.right, guesses, self._curve.seconds, draft_s)
            self._plan_is_of = count, count
        return self._plan

    def next(self, now: Situation) -> Launch | Wait | None:
        """The next step while there are credits."""
        step = self._next(now)
        if isinstance(step, Launch):
            trees = _by_sequence(now.trees)
            roots = sum(node is trees[node.sequence].root for node in step.nodes)
            self._trial.launched(roots, sum(probabilities(trees, step.nodes)))
            self._plan_is_of = self._plan_is_of[0], self._plan_is_of[1] - roots
        return step

    def _next(self, now: Situation) -> Launch | Wait | None:
        curve, count = self._curve, len(now.trees)
        self._count, self._prompts = count, now.prompts
        roots = -(-count // self._stages)
        if self._traffic is None:
            self._traffic = Traffic(now.now, count, self._stages, roots, curve.seconds(roots))
        planned = self._planned(count)
        self._trial.look(count, planned.rate, now.now)
        self._earns = max(self._traffic.rate, self._trial.share * planned.rate)
        in_cohorts = self._trial.in_cohorts
        self._drafting.look(now.trees, now.now, self._is_waiting, not in_cohorts)
        unsent, others = self._sorted(now)
        if in_cohorts:
            return self._of_cohort(unsent, planned, now)
        cohort = min(self._cohort(self._traffic), now.root_room)
        if cohort <= 0:
            return None
        ready, until = self._ready(unsent, cohort, now.now)
        self._is_waiting = len(ready) < len(unsent)
        if unsent and not ready:
            return self._wait(until, now.now)
        nodes = list[Node]()
        if ready:
            nodes = self._with_roots(ready[:cohort], cohort, now)
            until = self._held_until(ready, nodes, cohort, now.now)
            if now.now < until:
                give_back(_by_sequence(now.trees), nodes)
                return self._wait(until, now.now)
            self._note(self._traffic, ready[:cohort], len(nodes), now.now)
            nodes += self._piggybacked(others, len(nodes), len(ready[:cohort]), cohort, now)
        elif others:
            nodes = self._guess_run(others, now)
        return Launch(nodes) if nodes else None

    def _levels_pay(self, planned: Plan) -> bool:
        """Whether drafted levels are worth that prompts wait for them."""
        if not self._prompts:
            return True
        roots, levels = planned.roots, planned.levels
        more_s = self._curve.seconds(roots * (levels + 1)) - self._curve.seconds(roots)
        gained = sum(self._drafting.right ** (level + 1) for level in range(levels))
        return roots * gained > self._price(roots) * more_s

    def _of_cohort(self, unsent: Sequence[Tree], planned: Plan, now: Situation) -> Launch | Wait | None:
        """The next run of a cohort."""
        self._is_waiting = False
        pays = self._levels_pay(planned)
        levels = planned.levels if pays else 0
        ready_at = [self._orders.ready_at(tree, levels, now.now) if pays else now.now for tree in unsent]
        ready = [tree for tree, until in zip(unsent, ready_at, strict=True) if until <= now.now]
        cohort = min(planned.roots, now.root_room)
        if not ready or cohort <= 0:
            until = min(ready_at, default=math.inf)
            return self._wait(until, now.now) if cohort > 0 and until < math.inf else None
        del ready[cohort:]
        most = min(len(ready) * (levels + 1), max(len(ready), self._curve.reach))
        nodes = take_best(ready, most, len(ready), now.room, self._policy.min_path_prob)
        until = self._held_until(ready, nodes, cohort, now.now)
        if now.now < until:
            give_back(_by_sequence(ready), nodes)
            return self._wait(until, now.now)
        assert self._traffic
        for tree in ready:
            self._ready_at.setdefault(tree.sequence, now.now)
        self._wanted = len(nodes)
        self._note(self._traffic, ready, len(nodes), now.now)
        return Launch(nodes)

    def _held_until(self, ready: Sequence[Tree], nodes: Sequence[Node], cohort: int, now: float) -> float:
        """Until when a run of ``nodes`` waits for more roots than those of ``ready``; 0 if it does not."""
        if len(ready) >= cohort:
            return 0.0
        curve, rows, each = self._curve, len(nodes), max(1, len(nodes) // len(ready))
        self._held_since = now if self._held_since is None else self._held_since
        saved_s = curve.seconds(rows) + curve.seconds(each) - curve.seconds(rows + each)
        return self._held_since + min(saved_s, self._measured_s)

    def _sorted(self, now: Situation) -> tuple[list[Tree], list[Tree]]:
        """The trees with unsent roots, those that have waited longest first, and the others."""
        unsent, others = list[Tree](), list[Tree]()
        for tree in now.trees:
            if self._roots.get(tree.sequence) is not tree.root:
                self._roots[tree.sequence], self._since[tree.sequence] = tree.root, now.now
                self._ready_at.pop(tree.sequence, None)
            (unsent if tree.root.pending else others).append(tree)
        unsent.sort(key=lambda tree: self._since[tree.sequence])
        return unsent, others

    def _wait(self, until: float, now: float) -> Wait | None:
        """A Wait, unless there is one already that ends no later."""
        if now < self._until <= until:
            return None
        self._until = until
        return Wait(until)

    def _cohort(self, traffic: Traffic) -> int:
        """K."""
        drafted_for = 2 * traffic.wait_s / traffic.run_s
        share, each = self._count / (self._stages + drafted_for), max(1.0, traffic.rows_per_root)
        few = max(1, int(share))

        def known(roots: int) -> float:
            return min(roots, share) / self._curve.seconds(max(roots, round(roots * each)))

        return few + (known(few + 1) > known(few))

    def _price(self, cohort: int) -> float:
        """pi."""
        assert self._traffic
        owed = self._earns * (1 + self._prompts / self._count)
        return owed * max(1.0, cohort * self._stages / self._count)

    def _row_price(self, price: float, rows: int) -> float:
        """What each of as many further rows as ``rows`` costs in tokens."""
        return price * max(0.0, self._curve.seconds(2 * rows) - self._curve.seconds(rows)) / rows

    def _ready(self, unsent: Sequence[Tree], cohort: int, now: float) -> tuple[list[Tree], float]:
        """Those of ``unsent`` that wait for no drafts, and when the others have waited too long."""
        traffic, drafting = self._traffic, self._drafting
        assert traffic
        least = self._row_price(self._price(cohort), ROWS * cohort)
        earns = self._earns / self._count
        later = self._guess_run_price(2)
        ready, until = list[Tree](), 0.0
        for tree in unsent:
            wait_s = drafting.wait_s(tree, now) if self._policy.speculate else None
            if wait_s is not None:
                found = drafting.right * drafting.leaf(tree)
                saved = min(found, least / (1 - traffic.busy) + found * earns * traffic.run_s / 2, later)
                if saved - least > wait_s * earns:
                    ends = drafting.until(tree, now)
                    until = ends if not until else min(until, ends)
                    continue
            self._ready_at.setdefault(tree.sequence, now)
            ready.append(tree)
        return ready, until

    def _with_roots(self, ready: Sequence[Tree], cohort: int, now: Situation) -> list[Node]:
        """Take the roots of ``ready`` and the rows of their trees that are worth most."""
        trees, curve = _by_sequence(ready), self._curve
        guesses = now.room if self._policy.speculate else 0
        most = min(len(ready) + self._policy.max_rows, max(len(ready), curve.reach))
        nodes = take_best(ready, most, len(ready), guesses, self._policy.min_path_prob)
        assert self._traffic
        price, roots, usual_s = self._price(cohort), len(ready), self._traffic.run_s
        totals = list(accumulate(probabilities(trees, nodes)))
        best = max(range(roots, len(nodes) + 1), key=lambda rows: totals[rows - 1] - price * curve.seconds(rows))
        self._wanted = best
        while self._launches > self._stages and best > roots and curve.seconds(best) > LONGEST * usual_s:
            best -= 1
        give_back(trees, nodes[best:])
        return nodes[:best]

    def _note(self, traffic: Traffic, ready: Sequence[Tree], rows: int, now: float) -> None:
        """A run leaves with the roots of ``ready``."""
        self._held_since = None
        self._launches += 1
        waited_s = sum(self._ready_at[tree.sequence] - self._since[tree.sequence] for tree in ready)
        traffic.launched(len(ready), rows, self._curve.seconds(self._wanted), waited_s)

    def _piggybacked(self, others: Sequence[Tree], rows: int, roots: int, cohort: int, now: Situation) -> list[Node]:
        """Take the guesses of ``others`` that are worth a place beside ``rows`` rows, of ``roots`` roots."""
        assert self._traffic
        curve = self._curve
        room = now.room - rows + roots
        most = min(self._policy.max_rows, curve.reach - rows)
        price = PIGGYBACK * self._price(cohort) / (1 - self._traffic.busy)
        least = self._row_price(price, max(ROWS, rows))
        if room <= 0 or most <= 0 or least >= 1 or not self._policy.speculate or self._prompts:
            return []
        found = take_best(others, most, 0, room, max(least / 2, self._policy.min_path_prob))
        trees = _by_sequence(others)
        totals = [0.0, *accumulate(probabilities(trees, found))]
        best = max(range(len(found) + 1), key=lambda more: totals[more] - price * curve.seconds(rows + more))
        give_back(trees, found[best:])
        return found[:best]

    def _guess_run(self, others: Sequence[Tree], now: Situation) -> list[Node]:
        """Take the guesses of ``others`` that are worth a run of their own."""
        traffic, curve = self._traffic, self._curve
        assert traffic
        if not self._policy.speculate or now.room <= 0 or self._prompts:
            return []
        most = min(self._policy.max_rows, curve.reach)
        found = take_best(others, most, 0, now.room, self._policy.min_path_prob)
        trees = _by_sequence(others)
        best, most_useful = 0, 0.0
        for rows, total in enumerate(accumulate(probabilities(trees, found)), 1):
            useful = total / (curve.seconds(rows) + traffic.runs_per_s * self._holds_up_s(rows) ** 2 / 2)
            if useful >= most_useful and total > self._guess_run_price(rows):
                best, most_useful = rows, useful
        give_back(trees, found[best:])
        return found[:best]

    def _holds_up_s(self, rows: int) -> float:
        """X."""
        assert self._traffic
        run_s, usual_s = self._curve.seconds(rows), self._traffic.run_s
        return max(run_s, self._stages * (run_s - usual_s) + usual_s)

    def _guess_run_price(self, rows: int) -> float:
        """F."""
        traffic = self._traffic
        assert traffic
        late = traffic.runs_per_s * traffic.roots * self._earns / self._count * self._holds_up_s(rows) ** 2 / 2
        return late + GUESS_RUN * self._earns * self._curve.seconds(rows) / (1 - traffic.busy)


def _by_sequence(trees: Sequence[Tree]) -> dict[int, Tree]:
    return {tree.sequence: tree for tree in trees}
