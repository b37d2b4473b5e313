"""L11: a schedule does what it is named for, as far as messages and commands show it.

Tokens cannot depend on a schedule, so no other law notices one that cheats: a rival that is spared the work it was
published with would be compared unfairly. What is demanded of each is in its module; see pipeinfer.py and rounds.py.
"""

from __future__ import annotations

import math

from pipeinfer.core.ports import Command, Compute, Computed, Emit, Event, Finish, Received, Request, Send
from pipeinfer.core.protocol import (
    FIRST_STAGE,
    NO_SLOT,
    ORCHESTRATOR,
    DraftRow,
    Flag,
    Kind,
    Message,
    Row,
    SettingRow,
    address_name,
)
from pipeinfer.sim.history import History, InvariantBroken, Reader
from pipeinfer.sim.world import World, WorldSpec
from speculation.schedules.schedule import UNLIMITED


class Orders(Reader):
    """Every order is answered once, by tokens that are as probable as it asked for; and who works to order is idle
    without one."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._open: dict[int, Message] = {}  # by drafter
        self._cutoffs: dict[int, float] = {}
        self._prompts: dict[int, tuple[int, int]] = {}  # the request, and how much of its prompt has arrived

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address <= world.spec.stages:
            return
        if isinstance(event, Received):
            self._hear(address, event.message)
        for command in commands:
            if isinstance(command, Send) and command.message.kind is Kind.NODES:
                self._answer(address, command.message)
            elif isinstance(command, Compute) and world.spec.policy.schedule != "continuous":
                is_prefill = command.batch.positions[-1] < self._prompts[address][1]
                if not is_prefill and address not in self._open:
                    raise InvariantBroken(
                        f"L11: {address_name(address)} drafts {command.batch.tokens} without an order"
                    )

    def _hear(self, address: int, message: Message) -> None:
        if message.kind is Kind.PROMPT:
            request, length = self._prompts.get(address, (0, 0))
            self._prompts[address] = (message.request, len(message.rows) + length * (request == message.request))
        elif message.kind is Kind.CLOSE:
            self._open.pop(address, None)
            self._cutoffs.pop(address, None)
        elif message.kind is Kind.ORDER:
            (order,) = message.rows_as(SettingRow)
            self._cutoffs[address] = order.value
            if address in self._open:
                raise InvariantBroken(f"L11: {address_name(address)} got an order before it had answered the last one")
            if order.low not in (0, UNLIMITED):
                self._open[address] = message

    def _answer(self, address: int, message: Message) -> None:
        if message.flags & Flag.LAST and self._open.pop(address, None) is None:
            raise InvariantBroken(f"L11: {address_name(address)} answers an order that nobody gave")
        cutoff = self._cutoffs.get(address, 0.0)
        for row in message.rows_as(DraftRow):
            if cutoff > 0 and row.logp < math.log(cutoff):
                what = f"token {row.token} of probability {math.exp(row.logp):.3g}"
                raise InvariantBroken(f"L11: {address_name(address)} found {what}, the cutoff is {cutoff:.3g}")


class OneRoundAtATime(Reader):
    """Rounds: draft anew, then one run that begins at the newest token, then nothing until it is back."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._length = 0
        self._in_flight = 0
        self._awaited = 0  # drafters at work
        self._has_drafted = False  # since the last token

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address != ORCHESTRATOR:
            return
        if isinstance(event, Received):
            message = event.message
            self._in_flight -= message.kind is Kind.RESULT
            if message.kind is Kind.NODES and message.flags & Flag.LAST and message.request == self.history.served:
                self._awaited -= 1
        for begun, told in self.history.parts:
            if begun is not None:
                self._length, self._awaited = len(begun.prompt), 0
            self._read(told, world.spec)

    def _read(self, commands: list[Command], spec: WorldSpec) -> None:
        for command in commands:
            if isinstance(command, Emit):
                self._length += len(command.tokens)
                self._has_drafted = False
            elif isinstance(command, Finish):
                return
            elif isinstance(command, Send):
                self._sent(command.message, spec)

    def _sent(self, message: Message, spec: WorldSpec) -> None:
        if message.kind is Kind.CANCEL:
            raise InvariantBroken(f"L11: rounds have nothing to cancel, but {message} was sent")
        if message.kind is Kind.ORDER:
            if self._in_flight or not message.flags & Flag.RESTART:
                raise InvariantBroken(f"L11: an order of a round, {message}, with {self._in_flight} runs in flight")
            self._awaited, self._has_drafted = self._awaited + 1, True
        elif message.kind is Kind.RUN:
            if not message.flags & Flag.CANONICAL:
                self._check(message, spec)
            self._in_flight += 1

    def _check(self, message: Message, spec: WorldSpec) -> None:
        rows = message.rows_as(Row)
        has_drafters = spec.policy.speculate and spec.drafters > 0
        if self._in_flight or self._awaited or (has_drafters and not self._has_drafted):
            why = f"{self._in_flight} runs in flight, {self._awaited} drafters at work"
            raise InvariantBroken(f"L11: run {message.run} is launched with {why}")
        deepest = self._length - 1 + max(spec.policy.num_steps, spec.policy.prompt_lookup)
        if not rows or rows[0].position != self._length - 1 or rows[-1].position > deepest:
            raise InvariantBroken(f"L11: run {message.run} of {len(rows)} rows is no round after {self._length} tokens")


class PipeInfer(Reader):
    """PipeInfer's: what its docstring says of runs, restarts, cancels and of what has to wait."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
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
        for begun, told in self.history.parts:
            if begun is not None:
                self._begin(begun)
            self._read(told, world.spec)

    def _begin(self, request: Request) -> None:
        self._text, self._stops = list(request.prompt), request.stop_tokens
        self._last_position = len(request.prompt) + request.max_new_tokens - 2
        self._awaited, self._owes_canonical, self._owes_drafted, self._canonical = set(), False, False, set()

    def _read(self, commands: list[Command], spec: WorldSpec) -> None:
        for command in commands:
            if isinstance(command, Emit):
                self._verified(command, spec)
            elif isinstance(command, Finish):
                return
            elif isinstance(command, Send):
                self._sent(command.message, spec)

    def _found(self, message: Message) -> None:
        if message.kind is not Kind.NODES or message.request != self.history.served:
            return
        for row in message.rows_as(DraftRow) if message.source in self._awaited else ():
            self._has_stopped |= row.token in self._stops
            self._owes_drafted |= not self._has_stopped and self._front <= self._last_position
        if message.flags & Flag.LAST:
            self._awaited.discard(message.source)

    def _verified(self, emit: Emit, spec: WorldSpec) -> None:
        if self._awaited or self._stage_works:
            what = "the first stage works" if self._stage_works else "tokens are drafted"
            raise InvariantBroken(f"L11: a result is heard while {what}")
        if self._owes_canonical:
            raise InvariantBroken("L11: two verifications, and no canonical run between them")
        if self._owes_drafted and spec.guess_slots is None and spec.drafters == 1:
            raise InvariantBroken(f"L11: what was drafted after {len(self._text)} tokens is thrown away unsent")
        self._text += emit.tokens
        self._front = len(self._text)
        self._owes_canonical = self._owes_restart = True
        self._has_stopped = self._owes_drafted = False

    def _sent(self, message: Message, spec: WorldSpec) -> None:
        if message.kind is Kind.ORDER:
            if bool(message.flags & Flag.RESTART) != self._owes_restart and not self._awaited:
                raise InvariantBroken(
                    f"L11: drafting goes on after {len(self._text)} tokens without a new start, or has two"
                )
            if self._stage_works:
                raise InvariantBroken("L11: tokens are drafted while the first stage works")
            self._awaited.add(message.dest)
            self._owes_restart = False
        elif message.kind is Kind.CANCEL:
            self._cancelled(message, spec)
        elif message.kind is Kind.RUN and not message.flags & Flag.CANONICAL:
            self._launched(message, spec)

    def _cancelled(self, message: Message, spec: WorldSpec) -> None:
        rows = message.rows_as(Row)
        if dead := self._canonical & {row.slot for row in rows if row.parent == NO_SLOT}:
            raise InvariantBroken(f"L11: the canonical runs {sorted(dead)} are cancelled")
        if spec.policy.cancel == "relay" and message.dest != spec.stages:
            raise InvariantBroken(f"L11: {address_name(message.dest)} is told first what to cancel")

    def _launched(self, message: Message, spec: WorldSpec) -> None:
        rows = message.rows_as(Row)
        newest = len(self._text) - 1
        if self._owes_canonical:
            self._owes_canonical = False
            if len(rows) == 1 and (rows[0].position, rows[0].token) == (newest, self._text[-1]):
                self._canonical.add(message.run)
                return
            if spec.guess_slots is None:
                raise InvariantBroken(
                    f"L11: after {newest + 1} tokens run {message.run} is no canonical one, but {rows}"
                )
        if spec.drafters == 1 and [row.position for row in rows] != list(range(self._front, self._front + len(rows))):
            raise InvariantBroken(f"L11: run {message.run} does not go on at position {self._front}: {rows}")
        self._front += len(rows)
        self._owes_drafted = False


def schedule_invariants(history: History) -> tuple[Reader, ...]:
    """L11 for the schedule of the history's world."""
    own = {"rounds": (OneRoundAtATime,), "pipeinfer": (PipeInfer,)}.get(history.spec.policy.schedule, ())
    return Orders(history), *(law(history) for law in own)
