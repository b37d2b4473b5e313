"""The orchestrator: the one place that decides what the target verifies, what is accepted and what is cancelled.

Theory of operation. Requests are served one at a time, in the order in which they were submitted. A prompt is cut into
chunks that flow through the stages like any run. The token tree starts at the prompt's last token; sources feed nodes
into it whenever they like (sources.py). A credit from the first stage means that it can take one more run: then the
schedule (schedule.py) takes nodes from the tree, as a rule the most probable unsent ones, and they leave as one run,
each in a slot of its own (slot_allocator.py).

    tree          run 7          run 8          run 9        results come back in launch order
    root --+-- a ---- b ---- c          ...                 RESULT 7: the target's token after each row of run 7
           +-- a'                                           accept: walk from the root along the target's own tokens

A result may move the root several tokens (accept.py). The nodes that die with it free their slots; a run whose rows are
all dead is cancelled, which is advice: the stages may skip it, and it comes back as a tombstone, or computed and
ignored. Accepted slots become canonical by an operation that rides in the next run. If nobody had guessed the target's
token, the new root is unsent, and being certain it leads the next run, which never waits behind dead work.

When the last token is out, everything in flight is dead; the request is over for its user at once. The next request
begins when the last run has come back; with ``overlap`` it begins at once, while the slots of the last one are still in
use, and those become free when its last run is back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from kvbuffers.slot_allocator import SlotAllocator
from pipeinfer.core.addresses import FIRST_STAGE, ORCHESTRATOR, address_name
from pipeinfer.core.edges import Edges
from pipeinfer.core.errors import LocalProtocolError, RankFailed, RemoteProtocolError
from pipeinfer.core.messages import (
    Body,
    Cancelled,
    Credit,
    Failed,
    Hello,
    Message,
    Nodes,
    Result,
    Run,
    Shutdown,
    Status,
    Wants,
)
from pipeinfer.core.ports import (
    Aborted,
    Closed,
    Command,
    Emit,
    Event,
    Finish,
    Halt,
    Idle,
    Note,
    Received,
    RequestStats,
    Send,
    Stalled,
    Started,
    Submitted,
    Wake,
    Woke,
)
from pipeinfer.orchestrator.advice import Advice
from pipeinfer.orchestrator.flight import Flight, InFlight
from pipeinfer.orchestrator.roster import Roster
from pipeinfer.orchestrator.session import Session, Waiting
from pipeinfer.orchestrator.sources import Sources
from speculation.schedules.cost_curve import NO_PRIORS, Priors
from speculation.schedules.policy import Policy
from speculation.schedules.registry import make_schedule
from speculation.schedules.schedule import UNLIMITED, Launch, Order, Placement, Situation, Wait
from speculation.trees.accept import accept
from speculation.trees.tree import Tree

RUNS_AHEAD = 1
"""Runs that may wait at the first stage: enough to keep it busy, and no more, so that choices stay fresh."""


class Orchestrator:
    """The machine that leads ``stages`` stages and ``drafters`` drafters. ``context``: most tokens of a request."""

    address = ORCHESTRATOR

    def __init__(
        self,
        stages: int,
        drafters: int,
        policy: Policy,
        context: int,
        digest: int = 0,
        guess_slots: int | None = None,
        calibrations: Mapping[str, Mapping[str, Any]] | None = None,
        placement: Placement = "spread",
        overlap: bool = False,
        priors: Priors = NO_PRIORS,
    ) -> None:
        self.roster = Roster(stages, drafters, digest)
        self._overlap = overlap
        self._policy = policy
        self._window = policy.most_runs(stages)
        self._edges = Edges(ORCHESTRATOR)
        self._allocator = SlotAllocator(
            (1 + overlap) * context, policy.most_guesses(stages) if guess_slots is None else guess_slots
        )
        self._sources = Sources(self.roster.drafters, policy, context, self._send, calibrations or {})
        self._schedule = make_schedule(policy, placement, priors, self._sources.right)
        self._advice = Advice(policy, self.roster.stages)
        self._deferred: deque[Result] = deque()  # results that the schedule defers
        self._now = 0.0
        self._flight = Flight()
        self._credits = RUNS_AHEAD
        self._sequences = 0
        self._waiting = Waiting(context)
        self._session: Session | None = None
        self._draining: Session | None = None  # over, with runs in flight, while the next one is being served
        self._is_closed = False

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; see Machine."""
        self._now = now
        if isinstance(event, Received):
            self._edges.check(event.message)
            return self._receive(event.message)
        if isinstance(event, Submitted):
            return self._submit(event)
        if isinstance(event, Aborted):
            return self._abort(event.number)
        if isinstance(event, Closed):
            return self._close()
        if isinstance(event, Stalled):
            return list(self.roster.probe())
        if isinstance(event, Woke):
            return self._proceed()
        if isinstance(event, Started):
            return []
        raise LocalProtocolError(f"the orchestrator cannot handle {type(event).__name__}")

    @property
    def load(self) -> tuple[int, int]:
        """How many runs are in flight, and how many verifications (see RequestStats) the session has had."""
        return len(self._flight), self._session.stats.verifications if self._session else 0

    def status(self) -> str:
        """One line for a person who asks why nothing moves."""
        if self._session is None or self.roster.awaited:
            return self.roster.waiting_for() or "idle"
        return f"{self._flight}, {self._credits} credits, {self._session.emitted} tokens emitted"

    def report(self) -> list[str]:
        """What each role answered to the last Stalled, one line each; the silent ones are named too."""
        return [f"orchestrator: {self.status()}", *self.roster.report()]

    def _receive(self, message: Message) -> list[Command]:
        match message.body:
            case Result() as result:
                self._deferred.append(result)
                return self._proceed()
            case Credit() as credit:
                self._credits += 1
                if credit.rows:
                    self._schedule.computed(credit.rows, 1e-6 * credit.spent_us)
                return self._proceed()
            case Nodes() as nodes:
                found = self._sources.grow(message.source, nodes)
                if found is not None:
                    self._schedule.drafted(found)
                return self._proceed()
            case Hello(digest):
                self.roster.hello(message.source, digest)
                return self._begin()
            case Status() as status:
                self.roster.answered(message.source, status)
                return []
            case Failed(exit_code):
                raise RankFailed(address_name(message.source), exit_code)
        raise RemoteProtocolError(f"the orchestrator got {message.kind} from {address_name(message.source)}")

    # A request begins and ends.

    def _submit(self, submitted: Submitted) -> list[Command]:
        served = {session.caller_number for session in (self._session, self._draining) if session is not None}
        if self._is_closed or submitted.number in served:
            why = "after the last one" if self._is_closed else "while another one of that number is being served"
            raise LocalProtocolError(f"request {submitted.number} was submitted {why}")
        self._waiting.add(submitted)
        return self._open()

    def _open(self) -> list[Command]:
        """If nothing is being served: begin the next request, or end where no further one will come."""
        if self._session is not None:
            return []
        if not self._waiting:
            if not self._is_closed or self._draining is not None:
                return []
            return [*(self._send(dest, Shutdown()) for dest in self.roster.everybody), Halt()]
        caller_number, request = self._waiting.take()
        self._sequences += 1
        tree = Tree(request.prompt[-1], len(request.prompt) - 1, self._sources.most_nodes())
        tree.take(tree.root)  # it leaves with the prompt
        self._session = Session(request, caller_number, self._sequences, tree)
        return self._begin()

    def _begin(self) -> list[Command]:
        """Start the submitted request as soon as everybody is there."""
        session = self._session
        if self.roster.awaited or session is None or session.prefilled:
            return []
        settings = session.request.sampling.settings(session.sequence, len(session.request.prompt))
        self._schedule.opened()
        commands: list[Command] = [self._send(FIRST_STAGE, settings)]
        commands += self._sources.open(session.request, session.sequence, session.tree, session.last_position)
        return commands + self._proceed()

    def _abort(self, number: int) -> list[Command]:
        if self._waiting.remove(number):
            return [Finish("aborted", number), Idle(RequestStats(), number)]
        session = self._session
        if session is None or session.is_over or session.caller_number != number:
            return []
        return self._finish(session, "aborted") + self._proceed()

    def _close(self) -> list[Command]:
        self._is_closed = True
        commands = [command for number in self._waiting.numbers for command in self._abort(number)]
        if self._session is not None:
            return commands + self._abort(self._session.caller_number)
        return commands + self._open()

    def _finish(self, session: Session, reason: str, fault: int | None = None) -> list[Command]:
        session.is_over = True
        # A later run may carry the commit of the root's slot, so the root's own run must be written everywhere.
        root = session.tree.root.run
        mine = [run for run in self._flight if run.session is session]
        doomed = [run for run in mine if run.cancelled_at is None and (run.is_prefill or run.number != root)]
        commands: list[Command] = [Finish(reason, session.caller_number, fault)]
        commands += self._cancel(doomed, [], session)
        commands += self._sources.close(session.sequence)
        self._sources.account(session.stats)
        if self._overlap and self._draining is None and mine:
            self._session, self._draining = None, session
            return commands + self._open()
        return commands + self._settle(session)

    def _settle(self, session: Session) -> list[Command]:
        """If all runs of ``session``, which is over, are back: its slots are free, and the next request begins."""
        if any(run.session is session for run in self._flight):
            return []
        if session is self._draining:
            self._draining = None
        else:
            self._session = None
        self._allocator.free(session.sequence)
        return [Idle(session.stats, session.caller_number), *self._open()]

    # Runs leave.

    def _proceed(self) -> list[Command]:
        """Everything that can be done now: handle results, send runs, order drafts."""
        commands: list[Command] = []
        while (step := self._step()) is not None:
            commands += step
        return commands

    def _step(self) -> list[Command] | None:
        session = self._session
        if session is None:
            return self._result(self._deferred.popleft()) if self._deferred else None
        situation = Situation(
            session.tree,
            self._credits,
            len(self._flight),
            self._window - len(self._flight),
            self._allocator.room(),
            self._now,
        )
        is_awaited = not session.is_over and self._draining is None
        if self._deferred and not (is_awaited and self._schedule.defers_results(situation)):
            return self._result(self._deferred.popleft())
        if session.is_over or self.roster.awaited:
            return None
        if session.prefilled < len(session.request.prompt):
            return [self._launch_prefill(session)] if self._credits > 0 and situation.slots > 0 else None
        step = self._schedule.next(situation)
        if isinstance(step, Wait):
            return [Wake(step.until)]
        if isinstance(step, Launch):
            return [self._launch(session, step)]
        return self._order(step) if isinstance(step, Order) else step

    def _order(self, order: Order) -> list[Command]:
        sends = self._sources.order(order)
        if not sends and order.passes not in (0, UNLIMITED):
            self._schedule.drafted([])  # without drafters nobody will answer
        return list(sends)

    def _launch_prefill(self, session: Session) -> Send:
        prompt = session.request.prompt
        chunk = prompt[session.prefilled :][: self._policy.prefill_chunk]
        ops, rows = self._allocator.prompt_rows(session.sequence, chunk)
        session.prefilled += len(rows)
        run = self._flight.launch(session, self._now, is_prefill=True)
        wants = Wants.NOTHING
        if session.prefilled == len(prompt):
            wants = Wants.LAST
            session.tree.root.run, session.tree.root.slot = run.number, rows[-1].slot
            run.nodes = [session.tree.root]
        session.stats.prefill_runs += 1
        return self._send_run(Run(run.number, is_canonical=True, wants=wants, ops=ops, rows=tuple(rows)))

    def _launch(self, session: Session, launch: Launch) -> Send:
        run = self._flight.launch(session, self._now, is_canonical=launch.is_canonical)
        run.nodes, run.copies = launch.nodes, launch.copies
        ops = self._allocator.operations()
        slots = self._allocator.lease(session.sequence, len(run.nodes) + len(run.copies))
        for node, slot in zip(run.nodes, slots, strict=False):
            node.slot, node.run = slot, run.number
            if node is session.tree.root:
                run.carries_root = True
                self._allocator.commit(session.sequence, slot)  # it is accepted already
        rows = [node.row(slot, session.sequence) for node, slot in zip([*run.nodes, *run.copies], slots, strict=True)]
        self._allocator.release(session.sequence, *slots[len(run.nodes) :])  # nobody will ever look at a copy
        session.stats.runs += 1
        session.stats.rows += len(rows)
        session.stats.drafted += len(run.nodes) - run.carries_root
        return self._send_run(Run(run.number, ops=ops, rows=tuple(sorted(rows, key=attrgetter("position")))))

    # Results come back.

    def _result(self, result: Result) -> list[Command]:
        run = self._flight.land(result.run)
        session = run.session
        if result.is_tombstone:
            session.stats.tombstones += 1
            if run.cancelled_at is not None:
                session.stats.cancel_s += self._now - run.cancelled_at
        elif not run.is_prefill and session is self._session:
            trip_s = self._now - run.launched_at
            rows = len(run.nodes) + len(run.copies)
            # Where rows died on the way nobody knows how many the slowest stage had.
            slowest_s = 1e-6 * result.slowest_us if len(result.rows) == rows else None
            self._schedule.returned(rows, slowest_s, trip_s, run.carries_root)
        if session.is_over:
            return self._settle(session)
        if not run.is_prefill:
            session.stats.busy_s += 1e-6 * result.work_us / len(self.roster.stages)
        fault = run.hear(result)
        return self._accept(session, run) if fault is None else self._finish(session, "error", fault)

    def _accept(self, session: Session, run: InFlight) -> list[Command]:
        left = session.request.max_new_tokens - session.emitted
        outcome = accept(session.tree, left, session.request.stop_tokens, self._sources.verified)
        if not outcome.accepted:
            return [] if outcome.fault is None else self._finish(session, "error", outcome.fault)
        session.emitted += len(outcome.accepted)
        session.stats.verifications += not run.is_prefill
        for node in outcome.accepted:
            if node.slot is None:
                session.stats.corrections += 1
            else:
                session.stats.accepted += 1
                self._allocator.commit(session.sequence, node.slot)
        tokens = tuple(node.token for node in outcome.accepted)
        commands: list[Command] = [Emit(tokens, tuple(outcome.logps), session.caller_number)]
        restarts = self._schedule.restarts(outcome.accepted)
        if restarts:
            outcome.died += session.tree.prune()
        self._allocator.release(session.sequence, *[node.slot for node in outcome.died if node.slot is not None])
        if outcome.stopped or session.emitted == session.request.max_new_tokens:
            return commands + self._finish(session, "stop" if outcome.stopped else "length")
        if outcome.fault is not None:
            return commands + self._finish(session, "error", outcome.fault)
        if decided := self._schedule.accepted(len(outcome.accepted), self._now):
            commands.append(Note(decided))
        runs, rows = self._flight.losses(session.tree.root, outcome.died)
        commands += self._cancel(runs, rows, session)
        return commands + list(self._sources.advance(outcome.accepted, restarts, self._schedule.guesses))

    def _cancel(self, runs: list[InFlight], rows: list[Cancelled], session: Session) -> list[Command]:
        """Advise the stages to skip ``runs``, and ``rows`` of others."""
        for run in runs:
            run.cancelled_at = self._now
        session.stats.cancelled_runs += sum(not run.is_prefill for run in runs)
        return list(self._advice.cancel([run.number for run in runs], rows, session.sequence))

    def _send(self, dest: int, body: Body) -> Send:
        return Send(self._edges.message(dest, body))

    def _send_run(self, run: Run) -> Send:
        self._credits -= 1
        return self._send(FIRST_STAGE, run)
