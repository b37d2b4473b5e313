"""The orchestrator: the one place that decides what the target verifies, what is accepted and what is cancelled.

Theory of operation. Up to ``max_num_seqs`` requests are decoded at once; each is a session (session.py). A prompt is
cut into chunks that flow through the stages like any run. A token tree starts at the prompt's last token; sources feed
nodes into it whenever they like (sources.py). A credit from the first stage means that it can take one more run: then
the schedule (schedule.py) takes nodes from the trees, as a rule the most probable unsent ones, and they leave as one
run (launcher.py), each in a slot of its own (slot_allocator.py). Runs of prompts and runs of nodes take turns.

    tree          run 7          run 8          run 9        results come back in launch order
    root --+-- a ---- b ---- c          ...                 RESULT 7: the target's token after each row of run 7
           +-- a'                                           accept: walk from the root along the target's own tokens

A result may move the roots of several trees, each by several tokens (accept.py). The nodes that die with it free
their slots; a run whose rows are all dead is cancelled, which is advice: the stages may skip it, and it comes back as a
tombstone, or computed and ignored. Accepted slots become canonical by an operation that rides in the next run. If
nobody had guessed the target's token, the new root is unsent, and being certain it leads the next run.

When the last token of a request is out, the request is over for its user at once; its place is free when its last run
has come back. Where a known token finds no slot, although no guess holds one, the session that came last is preempted:
it gives up its slots and begins again later, with all tokens that are out as its prompt. pool.py has what is shared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from kvbuffers.slot_allocator import SlotAllocator
from pipeinfer.core.addresses import FIRST_STAGE, ORCHESTRATOR, address_name
from pipeinfer.core.edges import Edges
from pipeinfer.core.errors import LocalProtocolError, RankFailed, RemoteProtocolError
from pipeinfer.core.messages import Body, Credit, Failed, Hello, Message, Nodes, Result, Run, Shutdown, Status
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
    Send,
    Stalled,
    Started,
    Submitted,
    Wake,
    Woke,
)
from pipeinfer.orchestrator.advice import Advice
from pipeinfer.orchestrator.flight import Flight, InFlight
from pipeinfer.orchestrator.launcher import Launcher
from pipeinfer.orchestrator.pool import Pool
from pipeinfer.orchestrator.roster import Roster
from pipeinfer.orchestrator.session import Active, Session, Waiting
from pipeinfer.orchestrator.sources import Sources
from speculation.schedules.cost_curve import NO_PRIORS, Priors
from speculation.schedules.policy import Policy
from speculation.schedules.prefill_chunks import PrefillChunks
from speculation.schedules.registry import make_schedule
from speculation.schedules.schedule import UNLIMITED, Launch, Order, Placement, Situation, Wait
from speculation.trees.accept import accept
from speculation.trees.forest import pending_roots
from speculation.trees.tree import Node

RUNS_AHEAD = 1
"""Runs that may wait at the first stage: enough to keep it busy, and no more, so that choices stay fresh."""


class Orchestrator:
    """The machine that leads ``stages`` stages and ``drafters`` drafters. ``context``: most tokens of a request.

    ``max_num_seqs``: requests that are decoded at once; ``slots``: of every stage, for accepted tokens and for guesses;
    ``keeps_prefixes``: whether what a request has computed is kept for others that begin with the same tokens."""

    address = ORCHESTRATOR

    def __init__(
        self,
        stages: int,
        drafters: int,
        policy: Policy,
        context: int,
        digest: int = 0,
        slots: tuple[int, int] | None = None,
        calibrations: Mapping[str, Mapping[str, Any]] | None = None,
        placement: Placement = "spread",
        priors: Priors = NO_PRIORS,
        max_num_seqs: int = 1,
        keeps_prefixes: bool = False,
    ) -> None:
        self.roster = Roster(stages, drafters, digest)
        self._policy = policy
        self._window = policy.most_runs(stages)
        self._edges = Edges(ORCHESTRATOR)
        self._allocator = SlotAllocator(*(slots or (max_num_seqs * context, policy.most_guesses(stages))))
        self._pool = Pool(self._allocator, keeps_prefixes)
        self._sources = Sources(self.roster.drafters, policy, context, self._send, calibrations or {})
        self._schedule = make_schedule(policy, placement, priors, self._sources.right, stages)
        self._most_sessions = min(max_num_seqs, self._schedule.most_sequences)
        self._advice = Advice(policy, self.roster.stages)
        self._deferred: deque[Result] = deque()  # results that the schedule defers
        self._now = 0.0
        self._flight = Flight()
        self._launcher = Launcher(self._allocator, self._flight, PrefillChunks(policy, stages, placement, priors.rows))
        self._credits = RUNS_AHEAD
        self._sequences = 0
        self._waiting = Waiting(context)
        self._sessions = Active()
        self._draining: list[Session] = []  # that are over, with runs in flight
        self._prompt_went_last = False
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
    def load(self) -> tuple[int, int, float]:
        """How many runs are in flight, how many verifications (see RequestStats) the sessions have had, and which share
        of the slots is in use (see Pool)."""
        verifications = sum(one.stats.verifications for one in self._sessions.values())
        return len(self._flight), verifications, self._pool.usage(self._sessions.values())

    def status(self) -> str:
        """One line for a person who asks why nothing moves."""
        if self.roster.awaited or not (self._sessions or self._waiting or self._draining):
            return self.roster.waiting_for() or "idle"
        emitted = sum(one.emitted for one in self._sessions.values())
        requests = f"{len(self._sessions)} requests, {len(self._waiting)} waiting, {emitted} tokens emitted"
        return f"{self._flight}, {self._credits} credits, {requests}"

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
                    self._schedule.drafted(self._sessions[nodes.sequence].tree, found)
                return self._proceed()
            case Hello(digest):
                self.roster.hello(message.source, digest)
                return self._proceed()
            case Status() as status:
                self.roster.answered(message.source, status)
                return []
            case Failed(exit_code):
                raise RankFailed(address_name(message.source), exit_code)
        raise RemoteProtocolError(f"the orchestrator got {message.kind} from {address_name(message.source)}")

    # A request begins and ends.

    def _submit(self, submitted: Submitted) -> list[Command]:
        if self._is_closed:
            raise LocalProtocolError(f"request {submitted.number} was submitted after the last one")
        number, served = submitted.number, (*self._sessions.values(), *self._draining)
        if number in self._waiting.numbers or any(one.caller_number == number for one in served):
            raise LocalProtocolError(f"request {number} was submitted while another one of that number is there")
        self._waiting.submit(submitted)
        return self._proceed()

    def _begin(self) -> list[Command] | None:
        """Begin the next request, if there is one and a place and slots for it."""
        session = self._waiting.next
        if session is None or len(self._sessions) + len(self._draining) >= self._most_sessions:
            return None
        if any(one.is_preempted and one.rank < session.rank for one in self._draining):
            return None  # it waits for its runs, and is the next one then
        sequence = self._sequences + 1
        shared = self._pool.begin(session, sequence, self._sessions.values())
        if shared is None:
            return None
        self._sequences = sequence
        self._waiting.take().begin(sequence, self._sources.most_nodes())
        session.prefilled = session.shared = shared
        self._sessions[sequence] = session
        self._schedule.opened(session.tree)
        settings = session.request.sampling.settings(sequence, len(session.request.prompt))
        return [self._send(FIRST_STAGE, settings), *self._sources.open(session)]

    def _abort(self, number: int) -> list[Command]:
        waiting = self._waiting.remove(number)
        if waiting is not None:
            return [Finish("aborted", number), Idle(waiting.stats, number), *self._end_if_closed()]
        for session in (*self._sessions.values(), *self._draining):
            if session.caller_number == number and session.is_preempted:
                session.is_preempted = False
                return [Finish("aborted", number)]  # its runs are on their way back
            if session.caller_number == number and not session.is_over:
                return self._finish(session, "aborted") + self._proceed()
        return []

    def _close(self) -> list[Command]:
        self._is_closed = True
        numbers = [*self._waiting.numbers, *(one.caller_number for one in (*self._sessions.values(), *self._draining))]
        commands = [command for number in numbers for command in self._abort(number)]
        return commands if numbers else self._end_if_closed()

    def _end_if_closed(self) -> list[Command]:
        """The end of the job, where no request is left and no further one will come."""
        if not self._is_closed or self._waiting or self._sessions or self._draining:
            return []
        return [*(self._send(dest, Shutdown()) for dest in self.roster.everybody), Halt()]

    def _finish(self, session: Session, reason: str, fault: int | None = None) -> list[Command]:
        if fault is not None:
            session.has_result = False  # its keys and values are not what they should be
        commands: list[Command] = [Finish(reason, session.caller_number, fault)]
        commands += self._stop(session)
        self._sources.account(session.stats)
        return commands + self._settle(session)

    def _stop(self, session: Session) -> list[Command]:
        """Decode ``session`` no further: nothing of it that is in flight is of use."""
        session.is_over = True
        del self._sessions[session.sequence]
        self._draining.append(session)
        commands: list[Command] = self._advice.cancel(*self._flight.doomed(session), self._now)
        session.tree.prune()
        self._schedule.closed(session.tree)
        return commands + list(self._sources.close(session.sequence))

    def _settle(self, session: Session) -> list[Command]:
        """If all runs of ``session``, which is over, are back: its place is free."""
        if session.runs:
            return []
        self._draining.remove(session)
        if session.is_preempted:
            self._waiting.put(session)
            return []
        self._pool.end(session, session.has_result)
        return [Idle(session.stats, session.caller_number), *self._end_if_closed()]

    def _preempt(self, session: Session) -> list[Command]:
        """Free the slots of ``session``, which begins again later."""
        session.is_preempted = True
        commands: list[Command] = [Note(f"preempt request {session.caller_number}"), *self._stop(session)]
        self._allocator.free(session.sequence)
        return commands + self._settle(session)

    # Runs leave.

    def _proceed(self) -> list[Command]:
        """Everything that can be done now: handle results, send runs, order drafts."""
        commands: list[Command] = []
        while (step := self._step()) is not None:
            commands += step
        return commands

    def _step(self) -> list[Command] | None:
        decoding, prompts, trees = self._sessions.split()
        self._pool.secure(trees, prompts)
        unsent = pending_roots(trees)
        now = Situation(
            trees,
            self._credits,
            len(self._flight),
            self._window - len(self._flight),
            self._allocator.room(len(decoding) if len(decoding) > 1 else unsent),
            self._now,
            self._allocator.free_slots(),
            len(prompts),
        )
        if self._deferred and not (self._sessions and self._schedule.defers_results(now)):
            return self._result(self._deferred.popleft())
        if self.roster.awaited:
            return None
        if (begun := self._begin()) is not None:
            return begun
        if unsent > now.root_room and not self._allocator.leased:  # a guess that holds a slot gives it back
            return self._preempt(max(self._sessions.values(), key=lambda one: one.rank))
        may_prefill = prompts and now.credits > 0 and now.slots > 0 and now.root_room > unsent
        commands: list[Command] = []
        if decoding and not (may_prefill and not self._prompt_went_last):
            step = self._schedule.next(now)
            if isinstance(step, Launch):
                self._prompt_went_last = False
                return [self._send_run(self._launcher.nodes(step, self._sessions, self._now))]
            if isinstance(step, Order):
                return self._order(step)
            if isinstance(step, Wait):
                commands.append(Wake(step.until))
        run = self._launcher.prompts(prompts, self._now, unsent, bool(decoding)) if may_prefill else None
        if run is not None:
            self._sessions.prefilled()
            self._prompt_went_last = True
            commands.append(self._send_run(run))
        return commands or None

    def _order(self, order: Order) -> list[Command]:
        sends = self._sources.order(order)
        if not self.roster.drafters and order.passes not in (0, UNLIMITED):
            for sequence, session in self._sessions.items():  # without drafters nobody will answer
                if order.sequence in (None, sequence):
                    self._schedule.drafted(session.tree, [])
        return list(sends)

    # Results come back.

    def _result(self, result: Result) -> list[Command]:
        run = self._flight.land(result.run)
        run.account(result, self._now, len(self.roster.stages))
        self._launcher.returned(run, result)
        if not (result.is_tombstone or run.is_prefill):
            # Where rows died on the way nobody knows how many the slowest stage had.
            slowest_s = 1e-6 * result.slowest_us if len(result.rows) == run.rows else None
            self._schedule.returned(run.rows, slowest_s, self._now - run.launched_at, run.carries_root)
        commands = [command for one in run.sessions if one.is_over for command in self._settle(one)]
        faults = run.hear(result, self._sessions)
        died, advanced = list[Node](), list[tuple[int, list[Node], bool]]()
        for session in [one for one in run.sessions if not one.is_over]:
            if session.sequence in faults:
                commands += self._finish(session, "error", faults[session.sequence])
            else:
                commands += [*run.scores(result, session), *self._accept(session, run, died, advanced)]
        roots = {sequence: one.tree.root for sequence, one in self._sessions.items()}
        commands += self._advice.cancel(*self._flight.losses(died, roots), self._now)
        guesses = self._schedule.guesses
        for sequence, accepted, restarts in advanced:
            commands += self._sources.advance(sequence, accepted, restarts, guesses)
        return commands

    def _accept(
        self, session: Session, run: InFlight, died: list[Node], advanced: list[tuple[int, list[Node], bool]]
    ) -> list[Command]:
        """Emit what is now known of ``session``. ``died`` and ``advanced`` take the nodes that died, and the sequence
        with its accepted nodes and whether guesses begin anew."""
        if not session.left and session.tree.root.choice is not None:  # only the prompt's log-probabilities were wanted
            session.has_result = True
            return self._finish(session, "length")
        outcome = accept(session.tree, session.left, session.request.stop_tokens, self._sources.verified)
        if not outcome.accepted:
            return [] if outcome.fault is None else self._finish(session, "error", outcome.fault)
        session.has_result = True
        session.emitted += len(outcome.accepted)
        session.stats.verifications += not run.is_prefill
        for node in outcome.accepted:
            session.stats.emit(node.slot is not None)
            if node.slot is not None:
                self._allocator.commit(session.sequence, node.slot)
        tokens = tuple(node.token for node in outcome.accepted)
        session.text += tokens
        tops = tuple(outcome.tops) if session.request.sampling.top_logprobs else ()
        commands: list[Command] = [Emit(tokens, tuple(outcome.logps), session.caller_number, tops)]
        restarts = self._schedule.restarts(outcome.accepted)
        if restarts:
            outcome.died += session.tree.prune()
        died += outcome.died
        self._allocator.release(session.sequence, *[node.slot for node in outcome.died if node.slot is not None])
        if outcome.stopped or not session.left:
            return commands + self._finish(session, "stop" if outcome.stopped else "length")
        if outcome.fault is not None:
            return commands + self._finish(session, "error", outcome.fault)
        if decided := self._schedule.accepted(session.tree, len(outcome.accepted), self._now):
            commands.append(Note(decided))
        advanced.append((session.sequence, outcome.accepted, restarts))
        return commands

    def _send(self, dest: int, body: Body) -> Send:
        return Send(self._edges.message(dest, body))

    def _send_run(self, run: Run) -> Send:
        self._credits -= 1
        return self._send(FIRST_STAGE, run)
