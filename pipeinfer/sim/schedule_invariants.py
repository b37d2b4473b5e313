"""L11: a schedule does what it is named for, as far as messages and commands show it.

Tokens cannot depend on a schedule, so no other invariant notices one that cheats: a rival that is spared the work it
was published with would be compared unfairly. What is demanded of each is in its module; see pipeinfer.py and
rounds.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeinfer.core.addresses import FIRST_STAGE, ORCHESTRATOR, address_name
from pipeinfer.core.messages import (
    NO_SLOT,
    Body,
    Cancel,
    Close,
    DraftOrder,
    Message,
    Nodes,
    Prompt,
    Result,
    Run,
)
from pipeinfer.core.ports import Command, Compute, Computed, Emit, Event, Finish, Received, Request, Send
from pipeinfer.sim.history import History, InvariantBroken, Reader
from pipeinfer.sim.world import World, WorldSpec
from speculation.schedules.schedule import UNLIMITED


class Orders(Reader):
    """Every order is answered once, by tokens that are as probable as it asked for; and who works to order is idle
    without one."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._open: set[tuple[int, int]] = set()  # drafters at work, and for which sequence
        self._cutoffs: dict[tuple[int, int], float] = {}
        self._prompts: dict[tuple[int, int], int] = {}  # how many tokens of the prompt a drafter has been sent

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address <= world.spec.stages:
            return
        if isinstance(event, Received):
            self._received(address, event.message)
        for command in commands:
            if isinstance(command, Send) and isinstance(command.message.body, Nodes):
                self._answer(address, command.message.body)
            elif isinstance(command, Compute) and world.spec.policy.schedule != "continuous":
                self._compute(address, command)

    def _compute(self, address: int, compute: Compute) -> None:
        """A pass beyond all prompts needs an order for some sequence."""
        longest = max((length for (drafter, _), length in self._prompts.items() if drafter == address), default=0)
        is_ordered = any(drafter == address for drafter, _ in self._open)
        if compute.batch.positions.max() >= longest and not is_ordered:
            raise InvariantBroken(f"L11: {address_name(address)} drafts {compute.batch.tokens} without an order")

    def _received(self, address: int, message: Message) -> None:
        match message.body:
            case Prompt(sequence=sequence, tokens=tokens):
                self._prompts[address, sequence] = self._prompts.get((address, sequence), 0) + len(tokens)
            case Close(sequence=sequence):
                self._open.discard((address, sequence))
                self._cutoffs.pop((address, sequence), None)
                self._prompts.pop((address, sequence), None)
            case DraftOrder() as order:
                self._cutoffs[address, order.sequence] = order.cutoff
                if (address, order.sequence) in self._open:
                    who = address_name(address)
                    raise InvariantBroken(f"L11: {who} got an order before it had answered the last one")
                if order.passes not in (0, UNLIMITED):
                    self._open.add((address, order.sequence))

    def _answer(self, address: int, nodes: Nodes) -> None:
        if nodes.ends_order:
            if (address, nodes.sequence) not in self._open:
                raise InvariantBroken(f"L11: {address_name(address)} answers an order that nobody gave")
            self._open.discard((address, nodes.sequence))
        cutoff = self._cutoffs.get((address, nodes.sequence), 0.0)
        for node in nodes.nodes:
            if cutoff > 0 and node.logp < math.log(cutoff):
                what = f"token {node.token} of probability {math.exp(node.logp):.3g}"
                raise InvariantBroken(f"L11: {address_name(address)} found {what}, the cutoff is {cutoff:.3g}")


@dataclass(slots=True)
class _Round:
    """The round of one sequence."""

    length: int  # of its text
    in_flight: int = 0  # runs with rows of it
    awaited: int = 0  # drafters at work
    has_drafted: bool = False  # since the last token


class OneRoundAtATime(Reader):
    """Rounds: draft anew, then one run that begins at the newest token, then nothing until it is back. Each sequence
    has rounds of its own, and a run may serve those of several."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._rounds: dict[int, _Round] = {}  # by sequence

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address != ORCHESTRATOR:
            return
        if isinstance(event, Received):
            self._received(event.message.body)
        for record, command, begins in self.history.told:
            if begins:
                self._rounds[record.sequence] = _Round(len(record.prompt))
            one = self._rounds.get(record.sequence)
            if one is not None and isinstance(command, Emit):
                one.length += len(command.tokens)
                one.has_drafted = False
            elif isinstance(command, Finish):
                self._rounds.pop(record.sequence, None)
            elif one is not None and isinstance(command, Send):
                self._sent(record.sequence, one, command.message, world.spec)

    def _received(self, body: Body) -> None:
        if isinstance(body, Result) and body.run in self.history.runs:
            for sequence in self.history.runs[body.run].records:
                if sequence in self._rounds:
                    self._rounds[sequence].in_flight -= 1
        elif isinstance(body, Nodes) and body.ends_order and body.sequence in self._rounds:
            self._rounds[body.sequence].awaited -= 1

    def _sent(self, sequence: int, one: _Round, message: Message, spec: WorldSpec) -> None:
        body = message.body
        if isinstance(body, Close):
            self._rounds.pop(sequence)
        elif isinstance(body, Cancel) and not self.history.sequences[sequence].dropped:
            raise InvariantBroken(f"L11: rounds have nothing to cancel, but {message} was sent")
        elif isinstance(body, DraftOrder):
            if one.in_flight or not body.restart:
                raise InvariantBroken(f"L11: an order of a round, {message}, with {one.in_flight} runs in flight")
            one.awaited, one.has_drafted = one.awaited + 1, True
        elif isinstance(body, Run):
            if not body.is_canonical:
                self._check(one, body, [row.position for row in body.rows if row.sequence == sequence], spec)
            one.in_flight += 1

    @staticmethod
    def _check(one: _Round, run: Run, positions: list[int], spec: WorldSpec) -> None:
        has_drafters = spec.policy.speculate and spec.drafters > 0
        if one.in_flight or one.awaited or (has_drafters and not one.has_drafted):
            why = f"{one.in_flight} runs in flight, {one.awaited} drafters at work"
            raise InvariantBroken(f"L11: run {run.run} is launched with {why}")
        deepest = one.length - 1 + max(spec.policy.num_steps, spec.policy.prompt_lookup)
        if positions[0] != one.length - 1 or positions[-1] > deepest:
            raise InvariantBroken(f"L11: run {run.run} of {positions} is no round after {one.length} tokens")


class PipeInfer(Reader):
    """PipeInfer's: the rules of its docstring for runs, restarts, cancels and results that are deferred. It serves one
    request at a time."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._served = 0  # the sequence
        self._text: list[int] = []
        self._owes_canonical = False
        self._front = 0  # where the next speculative run has to begin
        self._awaited: set[int] = set()  # drafters at work
        self._owes_restart = False
        self._owes_drafted = False  # tokens that were found have to be launched
        self._has_stopped = False  # a stop token was drafted: the rest of the chain is of no use
        self._last_position = 0
        self._stops: frozenset[int] = frozenset()
        self._canonical: set[int] = set()
        self._stage_works = False

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address == FIRST_STAGE:
            works = any(isinstance(command, Compute) for command in commands)
            self._stage_works = works or (self._stage_works and not isinstance(event, Computed))
        if address != ORCHESTRATOR:
            return
        if isinstance(event, Received):
            self._found(event.message)
        for record, command, begins in self.history.told:
            if begins:
                self._served = record.sequence
                self._begin(record.request)
            elif record.sequence == self._served and isinstance(command, Emit):
                self._verified(command, world.spec)
            elif isinstance(command, Finish) and record.sequence == self._served:
                self._served = 0
            elif record.sequence == self._served and isinstance(command, Send):
                self._sent(command.message, world.spec)

    def _begin(self, request: Request) -> None:
        self._text, self._stops = list(request.prompt), request.stop_tokens
        self._last_position = len(request.prompt) + request.max_new_tokens - 2
        self._awaited, self._owes_canonical, self._owes_drafted, self._canonical = set(), False, False, set()

    def _found(self, message: Message) -> None:
        nodes = message.body
        if not isinstance(nodes, Nodes) or nodes.sequence != self._served:
            return
        for node in nodes.nodes if message.source in self._awaited else ():
            self._has_stopped |= node.token in self._stops
            self._owes_drafted |= not self._has_stopped and self._front <= self._last_position
        if nodes.ends_order:
            self._awaited.discard(message.source)

    def _verified(self, emit: Emit, spec: WorldSpec) -> None:
        if self._awaited or self._stage_works:
            what = "the first stage works" if self._stage_works else "tokens are drafted"
            raise InvariantBroken(f"L11: a result is handled while {what}")
        if self._owes_canonical:
            raise InvariantBroken("L11: two verifications, and no canonical run between them")
        if self._owes_drafted and spec.guess_slots is None and spec.drafters == 1:
            raise InvariantBroken(f"L11: what was drafted after {len(self._text)} tokens is thrown away unsent")
        self._text += emit.tokens
        self._front = len(self._text)
        self._owes_canonical = self._owes_restart = True
        self._has_stopped = self._owes_drafted = False

    def _sent(self, message: Message, spec: WorldSpec) -> None:
        body = message.body
        if isinstance(body, DraftOrder):
            if body.restart != self._owes_restart and not self._awaited:
                raise InvariantBroken(
                    f"L11: drafting goes on after {len(self._text)} tokens without a new start, or has two"
                )
            if self._stage_works:
                raise InvariantBroken("L11: tokens are drafted while the first stage works")
            self._awaited.add(message.dest)
            self._owes_restart = False
        elif isinstance(body, Cancel):
            self._cancelled(body, message.dest, spec)
        elif isinstance(body, Run) and not body.is_canonical:
            self._launched(body, spec)

    def _cancelled(self, cancel: Cancel, dest: int, spec: WorldSpec) -> None:
        if dead := self._canonical & {row.run for row in cancel.rows if row.slot == NO_SLOT}:
            raise InvariantBroken(f"L11: the canonical runs {sorted(dead)} are cancelled")
        if spec.policy.cancel == "relay" and dest != spec.stages:
            raise InvariantBroken(f"L11: {address_name(dest)} is sent the first cancel")

    def _launched(self, run: Run, spec: WorldSpec) -> None:
        rows = run.rows
        newest = len(self._text) - 1
        if self._owes_canonical:
            self._owes_canonical = False
            if len(rows) == 1 and (rows[0].position, rows[0].token) == (newest, self._text[-1]):
                self._canonical.add(run.run)
                return
            if spec.guess_slots is None:
                raise InvariantBroken(f"L11: after {newest + 1} tokens run {run.run} is no canonical one, but {rows}")
        if spec.drafters == 1 and [row.position for row in rows] != list(range(self._front, self._front + len(rows))):
            raise InvariantBroken(f"L11: run {run.run} does not go on at position {self._front}: {rows}")
        self._front += len(rows)
        self._owes_drafted = False


def schedule_invariants(history: History) -> tuple[Reader, ...]:
    """L11 for the schedule of the history's world."""
    own = {"rounds": (OneRoundAtATime,), "pipeinfer": (PipeInfer,)}.get(history.spec.policy.schedule, ())
    return Orders(history), *(invariant(history) for invariant in own)
