"""The orchestrator: the one place that decides what the target verifies, what is accepted and what is cancelled.

Theory of operation. One request is served at a time. Its prompt is cut into chunks that flow through the stages like
any run. The token tree starts at the prompt's last token; drafters stream nodes into it whenever they like. A credit
from the first stage says that it can take one more run: then the most probable unsent nodes leave as one run
(policy.py), each in a cell of its own (partitions.py). Nothing is verified twice.

    tree          run 7          run 8          run 9        results come back in launch order
    root --+-- a ---- b ---- c          ...                 RESULT 7: the target's token after each row of run 7
           +-- a'                                           accept: walk from the root along the target's own tokens

A result may move the root several tokens (accept.py). The nodes that die with it free their cells; a run whose rows are
all dead is cancelled, which is advice: the stages may skip it, and it comes back as a tombstone, or computed and
ignored. Accepted cells become canonical by an operation that rides in the next run. If nobody had guessed the target's
token, the new root is unsent, and being certain it leads the next run, which never waits behind dead work.

The epoch counts those corrections. When the last token is out, everything in flight is dead; the request is over for
its user at once, and the machine is ready for the next one when the last run has come back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kvbuffers.partitions import Partitions
from pipeinfer.errors import LocalProtocolError, RemoteProtocolError
from pipeinfer.ports import (
    Closed,
    Command,
    Emit,
    Event,
    Finish,
    Halt,
    Idle,
    Received,
    Request,
    Send,
    Stalled,
    Started,
    Submitted,
    Tally,
    Withdrawn,
)
from pipeinfer.protocol import (
    FIRST_STAGE,
    MAX_ROWS,
    ORCHESTRATOR,
    AnyRow,
    CellOp,
    ChoiceRow,
    DraftRow,
    Edges,
    Flag,
    Kind,
    Message,
    Row,
    accepted_name,
    address_name,
    drafter_address,
    stage_address,
)
from speculation.accept import accept
from speculation.policy import Policy, choose_rows
from speculation.tree import Node, Tree

RUNS_AHEAD = 1
"""Runs that may wait at the first stage: enough to keep it busy, and no more, so that choices stay fresh."""


@dataclass(slots=True)
class Run:
    """A run in flight. ``living`` counts the rows that may still matter."""

    number: int
    nodes: list[Node] = field(default_factory=list)
    living: int = 0
    is_prefill: bool = False
    is_cancelled: bool = False


@dataclass(slots=True)
class Session:
    """The request being served."""

    request: Request
    number: int
    tree: Tree
    tally: Tally = field(default_factory=Tally)
    prefilled: int = 0
    emitted: int = 0
    is_over: bool = False

    @property
    def last_position(self) -> int:
        """The last position whose choice may still be emitted."""
        return len(self.request.prompt) + self.request.max_new_tokens - 2


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
        guess_cells: int | None = None,
    ) -> None:
        self._stages = [stage_address(index) for index in range(stages)]
        self._drafters = [drafter_address(index) for index in range(drafters)]
        self._policy = policy
        self._context = context
        self._digest = digest
        self._window = policy.most_runs(stages)
        self._edges = Edges(ORCHESTRATOR)
        self._ledger = Partitions(
            context, cell_budget(policy, stages, context)[1] if guess_cells is None else guess_cells
        )
        self._awaited = set(self._stages + self._drafters)
        self._flight: deque[Run] = deque()
        self._credits = RUNS_AHEAD
        self._runs = 0
        self._requests = 0
        self._epoch = 0
        self._session: Session | None = None
        self._names: dict[int, dict[int, Node]] = {drafter: {} for drafter in self._drafters}
        self._reports: dict[int, Message] = {}

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event; see Machine."""
        if isinstance(event, Received):
            self._edges.check(event.message)
            return self._receive(event.message)
        if isinstance(event, Submitted):
            return self._submit(event.request)
        if isinstance(event, Withdrawn):
            return self._withdraw()
        if isinstance(event, Closed):
            return [*(self._send(Kind.SHUTDOWN, dest) for dest in self._stages + self._drafters), Halt()]
        if isinstance(event, Stalled):
            self._reports.clear()
            return [Send(Message(Kind.PROBE, ORCHESTRATOR, dest)) for dest in self._stages + self._drafters]
        if isinstance(event, Started):
            return []
        raise LocalProtocolError(f"the orchestrator cannot handle {type(event).__name__}")

    def status(self) -> str:
        """One line for a person who asks why nothing moves."""
        if self._awaited:
            return "waiting for HELLO from " + ", ".join(address_name(address) for address in sorted(self._awaited))
        if self._session is None:
            return "idle"
        runs = [run.number for run in self._flight]
        flight = f"runs {runs[0]} to {runs[-1]} in flight" if runs else "nothing in flight"
        return f"{flight}, {self._credits} credits, {self._session.emitted} tokens emitted"

    def report(self) -> list[str]:
        """What each role answered to the last Stalled, one line each; the silent ones are named too."""
        lines = [f"orchestrator: {self.status()}"]
        for address in self._stages + self._drafters:
            answer = self._reports.get(address)
            said = f"run {answer.run}, {answer.epoch} waiting, {answer.txn} messages taken" if answer else "no answer"
            lines.append(f"{address_name(address)}: {said}")
        return lines

    def _receive(self, message: Message) -> list[Command]:
        if message.kind is Kind.RESULT:
            return self._result(message)
        if message.kind is Kind.CREDIT:
            self._credits += 1
            return self._dispatch()
        if message.kind is Kind.NODES:
            self._grow(message)
            return self._dispatch()
        if message.kind is Kind.HELLO:
            if message.run != self._digest:
                who = address_name(message.source)
                raise RemoteProtocolError(
                    f"{who} runs another configuration ({message.run:#x}, here {self._digest:#x})"
                )
            self._awaited.discard(message.source)
            return self._begin()
        if message.kind is Kind.STATUS:
            self._reports[message.source] = message
            return []
        raise RemoteProtocolError(f"the orchestrator got {message.kind.name} from {address_name(message.source)}")

    # A request begins and ends.

    def _submit(self, request: Request) -> list[Command]:
        if self._session is not None:
            raise LocalProtocolError("a request was submitted before the last one was idle")
        if not request.prompt or request.max_new_tokens < 1:
            raise LocalProtocolError("a request needs a prompt and at least one new token")
        if len(request.prompt) + request.max_new_tokens > self._context:
            raise LocalProtocolError(f"the request needs more than the context of {self._context} tokens")
        self._requests = (self._requests + 1) & 0xFFFF
        tree = Tree(request.prompt[-1], len(request.prompt) - 1, self._most_nodes())
        tree.take(tree.root)  # it leaves with the prompt
        self._session = Session(request, self._requests, tree)
        self._ledger.clear()
        self._epoch = 0
        return self._begin()

    def _most_nodes(self) -> int:
        return 1 + max(1, len(self._drafters)) * self._policy.most_nodes()

    def _begin(self) -> list[Command]:
        """Start the submitted request as soon as everybody is there."""
        session = self._session
        if self._awaited or session is None or session.prefilled:
            return []
        commands: list[Command] = []
        for drafter in self._drafters:
            self._names[drafter] = {accepted_name(session.tree.root.position): session.tree.root}
            commands += self._prompt(drafter, session)
        return commands + self._dispatch()

    def _prompt(self, drafter: int, session: Session) -> list[Command]:
        prompt, commands = session.request.prompt, list[Command]()
        for start in range(0, len(prompt), MAX_ROWS):
            rows = tuple(DraftRow(token, 0, 0, 0.0) for token in prompt[start : start + MAX_ROWS])
            flags = Flag.LAST if start + MAX_ROWS >= len(prompt) else Flag.NONE
            commands.append(self._send(Kind.PROMPT, drafter, flags, session.last_position, rows))
        return commands

    def _withdraw(self) -> list[Command]:
        session = self._session
        return [] if session is None or session.is_over else self._finish(session, "withdrawn")

    def _finish(self, session: Session, reason: str) -> list[Command]:
        session.is_over = True
        # A later run may carry the commit of the root's cell, so the root's own run must be written everywhere.
        root = session.tree.root.run
        doomed = [run for run in self._flight if not run.is_cancelled and (run.is_prefill or run.number != root)]
        commands: list[Command] = [Finish(reason)]
        commands += self._cancel(doomed, session)
        commands += [self._send(Kind.CLOSE, drafter) for drafter in self._drafters]
        return commands + self._settle()

    def _settle(self) -> list[Command]:
        session = self._session
        if session is None or not session.is_over or self._flight:
            return []
        self._session = None
        return [Idle(session.tally)]

    # Runs leave.

    def _dispatch(self) -> list[Command]:
        commands: list[Command] = []
        session = self._session
        while session and not session.is_over and len(self._flight) < self._window:
            # A new root is certain and goes at once, past whatever dead work still holds the credits.
            if self._credits <= 0 and not session.tree.root.pending:
                break
            if session.prefilled < len(session.request.prompt):
                commands.append(self._launch_prefill(session))
                continue
            nodes = choose_rows(session.tree, self._policy, self._ledger.room())
            if not nodes:
                break
            commands.append(self._launch(session, nodes))
        return commands

    def _launch_prefill(self, session: Session) -> Send:
        prompt = session.request.prompt
        ops, rows = self._ledger.prompt_rows(prompt[session.prefilled :][: self._policy.prefill_chunk])
        session.prefilled += len(rows)
        run = self._new_run(is_prefill=True)
        flags = Flag.CANONICAL | Flag.SILENT
        if session.prefilled == len(prompt):
            flags = Flag.CANONICAL | Flag.LAST
            session.tree.root.run, session.tree.root.slot = run.number, rows[-1].slot
            run.nodes, run.living = [session.tree.root], 1
        session.tally.prefill_runs += 1
        return self._send_run(run, ops, rows, flags)

    def _launch(self, session: Session, nodes: list[Node]) -> Send:
        run = self._new_run()
        run.nodes, run.living = nodes, len(nodes)
        ops = self._ledger.operations()
        for node, slot in zip(nodes, self._ledger.lease(len(nodes)), strict=True):
            node.slot, node.run = slot, run.number
            if node is session.tree.root:
                self._ledger.commit(slot)  # it is accepted already
        rows = [node.row() for node in nodes]
        session.tally.runs += 1
        session.tally.rows += len(nodes)
        session.tally.drafted += sum(node is not session.tree.root for node in nodes)
        return self._send_run(run, ops, rows, Flag.NONE)

    def _new_run(self, is_prefill: bool = False) -> Run:
        self._runs += 1
        self._credits -= 1
        run = Run(self._runs, is_prefill=is_prefill)
        self._flight.append(run)
        return run

    # Results come back.

    def _result(self, message: Message) -> list[Command]:
        if not self._flight or self._flight[0].number != message.run:
            expected = self._flight[0].number if self._flight else "none"
            raise RemoteProtocolError(f"result of run {message.run}, expected {expected}")
        run = self._flight.popleft()
        session = self._session
        if session is None:
            raise RemoteProtocolError(f"result of run {message.run} without a request")
        if message.flags & Flag.TOMBSTONE:
            session.tally.tombstones += 1
        if session.is_over:
            return self._settle()
        choices = {row.slot: row.token for row in message.rows_as(ChoiceRow)}
        for node in run.nodes:
            node.choice = choices.get(node.row().slot)
            if node.alive and node.choice is None:
                raise RemoteProtocolError(
                    f"run {run.number} came back without its living row at position {node.position}"
                )
        return self._accept(session) + self._dispatch()

    def _accept(self, session: Session) -> list[Command]:
        left = session.request.max_new_tokens - session.emitted
        outcome = accept(session.tree, left, session.request.stop_tokens)
        if not outcome.accepted:
            return []
        session.emitted += len(outcome.accepted)
        for node in outcome.accepted:
            if node.slot is None:
                self._epoch += 1
                session.tally.corrections += 1
            else:
                session.tally.accepted += 1
                self._ledger.commit(node.slot)
        commands: list[Command] = [Emit(tuple(node.token for node in outcome.accepted))]
        dead_runs = self._bury(outcome.died)
        if outcome.stopped or session.emitted == session.request.max_new_tokens:
            return commands + self._finish(session, "stop" if outcome.stopped else "length")
        commands += self._cancel(dead_runs, session)
        for drafter in self._drafters:
            commands.append(self._tell(drafter, outcome.accepted))
        return commands

    def _bury(self, died: list[Node]) -> list[Run]:
        """Free the cells of dead nodes; the runs that lost their last living row with them."""
        losses: dict[int, int] = {}
        for node in died:
            if node.slot is not None:
                self._ledger.release(node.slot)
            if node.run is not None:
                losses[node.run] = losses.get(node.run, 0) + 1
        dead_runs = []
        for run in self._flight:
            if lost := losses.get(run.number):
                run.living -= lost
                if not run.living:
                    dead_runs.append(run)
        return dead_runs

    def _cancel(self, runs: list[Run], session: Session) -> list[Command]:
        """Advise the stages to skip ``runs``."""
        for run in runs:
            run.is_cancelled = True
        session.tally.cancelled_runs += sum(not run.is_prefill for run in runs)
        if not runs or self._policy.cancel == "off":
            return []
        rows = tuple(Row(0, run.number, 0, 0) for run in runs)
        if self._policy.cancel == "relay":
            return [Send(self._advice(self._stages[-1], Flag.RELAY, rows))]
        return [Send(self._advice(stage, Flag.NONE, rows)) for stage in self._stages]

    def _advice(self, dest: int, flags: Flag, rows: tuple[Row, ...]) -> Message:
        return Message(Kind.CANCEL, ORCHESTRATOR, dest, flags, self._requests, self._epoch, rows=rows)

    # Talking with drafters.

    def _tell(self, drafter: int, accepted: list[Node]) -> Send:
        names = self._names[drafter]
        names.update((accepted_name(node.position), node) for node in accepted)
        rows = tuple(DraftRow(node.token, accepted_name(node.position), 0, 0.0) for node in accepted)
        return self._send(Kind.ADVANCE, drafter, rows=rows)

    def _grow(self, message: Message) -> None:
        """Take a drafter's nodes into the tree; what hangs on a dead branch is left out."""
        session = self._session
        if session is None or session.is_over or message.request != session.number:
            return
        names = self._names[message.source]
        for row in message.rows_as(DraftRow):
            parent = names.get(row.parent)
            if parent is None or parent.position >= session.last_position or row.token in session.request.stop_tokens:
                continue
            node = session.tree.add(parent, row.token, row.logp)
            if node is not None:
                names[row.node] = node
        # The drafter names no node above its own root any more (``run`` is that root's position).
        if len(names) > 4 * session.tree.max_nodes:
            keep = {name: node for name, node in names.items() if node.alive and node.position >= message.run}
            self._names[message.source] = keep

    def _send(
        self, kind: Kind, dest: int, flags: Flag = Flag.NONE, run: int = 0, rows: tuple[AnyRow, ...] = ()
    ) -> Send:
        txn = self._edges.stamp(dest)
        return Send(Message(kind, ORCHESTRATOR, dest, flags, self._requests, self._epoch, txn, run, (), rows))

    def _send_run(self, run: Run, ops: tuple[CellOp, ...], rows: list[Row], flags: Flag) -> Send:
        txn = self._edges.stamp(FIRST_STAGE)
        message = Message(
            Kind.RUN, ORCHESTRATOR, FIRST_STAGE, flags, self._requests, self._epoch, txn, run.number, ops, tuple(rows)
        )
        return Send(message)


def cell_budget(policy: Policy, stages: int, context: int) -> tuple[int, int]:
    """Cells of every target shard: for accepted tokens, and for guesses in flight."""
    guesses = policy.rows * policy.most_runs(stages) if policy.speculate else 0
    return context, guesses
