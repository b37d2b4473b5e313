"""What happened in a world, told from its messages alone: what the invariants are checked against."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from pipeinfer.core.ports import Command, Emit, Event, Finish, Idle, Request, Send, Submitted
from pipeinfer.core.protocol import (
    ORCHESTRATOR,
    Flag,
    Kind,
    Message,
    Row,
)
from pipeinfer.runtime.timeline import Service
from pipeinfer.sim.world import Checker, World, WorldSpec
from stages.models.emulated import EmulatedSpec, plain_answer

_THROWN_AWAY = (Kind.ADVANCE, Flag.RESTART)


class InvariantBroken(AssertionError):
    """An invariant does not hold; the message begins with its number."""


@functools.lru_cache(maxsize=64)
def ending(model: EmulatedSpec, request: Request) -> tuple[tuple[int, ...], int | None]:
    """What plain decoding answers, and the layer by whose numbers it ends, if any; worlds are often run more than
    once."""
    words = request.prompt, request.max_new_tokens, request.stop_tokens, request.sampling
    tokens, fault = plain_answer(model, *words)
    return tuple(tokens), fault


def oracle(model: EmulatedSpec, request: Request) -> tuple[int, ...]:
    """The tokens that plain decoding answers."""
    return ending(model, request)[0]


@dataclass(slots=True, eq=False)
class Written:
    """A token as it was written to a slot by a run; its fate is remembered once it is known."""

    token: int
    position: int
    parent: Written | None
    is_copy: bool = False  # another slot holds the same token after the same ones
    accepted: bool = False
    dead: bool = False


@dataclass(slots=True, eq=False)
class Launched:
    """A run as it left the orchestrator, and the canonical and leased slots after it."""

    message: Message
    written: dict[int, Written]
    canonical: int = 0
    leased: frozenset[int] = frozenset()


Part = tuple[Request | None, list[Command]]
"""The request that begins, if one does, and commands about it or about the one that was being served."""


class History(Checker):
    """What has happened, from messages and emissions alone; the other checkers read it."""

    def __init__(self, spec: WorldSpec) -> None:
        self.spec = spec
        self.requests = 0  # that have begun: the number of the newest one in messages
        self.served = 0  # the same, before the orchestrator's last event
        self.text: list[int] = []  # the prompt and what has been emitted
        self.truth: list[int] = []  # the prompt and what ought to be emitted
        self.fault: int | None = None  # the layer by whose numbers the request ought to end
        self.over = True
        self.has_begun = False  # whether a token of this request has been emitted
        self.runs: dict[int, Launched] = {}
        self.parts: list[Part] = []  # the orchestrator's last commands, see _part
        self._service = Service()
        self._at: dict[int, Written] = {}
        self._known: dict[tuple[Written, int], Written] = {}  # tokens sent, with what they were sent after
        # Whoever throws guesses away tells drafters so; without any nobody is told.
        self._may_repeat = spec.policy.schedule == "pipeinfer" or (not spec.policy.reuse and spec.drafters == 0)

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address != ORCHESTRATOR:
            return
        self.served = self.requests
        self.parts = self._part(event, commands)
        for begun, told in self.parts:
            if begun is not None:
                self._begin(begun)
            self._read(told)

    def _part(self, event: Event, commands: list[Command]) -> list[Part]:
        """``commands`` by the request they are about: first the one that was being served, then the one that begins."""
        begun = self._service.submitted(event) if isinstance(event, Submitted) else None
        parts: list[Part] = [(begun, [])]
        for command in commands:
            if not isinstance(command, Emit | Finish | Idle) or command.number == self._service.number:
                parts[-1][1].append(command)  # not what a user hears of a request that only waits
            if isinstance(command, Idle) and (begun := self._service.idle(command)) is not None:
                parts.append((begun, []))
        return parts

    def _begin(self, request: Request) -> None:
        self.requests += 1
        self.text = list(request.prompt)
        tokens, self.fault = ending(self.spec.model, request)
        self.truth = [*request.prompt, *tokens]
        self.over = self.has_begun = False
        self.runs, self._at = {}, {}
        self._known = {}

    def _read(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Emit):
                self.text += command.tokens
                self.has_begun = True
            elif isinstance(command, Finish):
                self.over = True
            elif isinstance(command, Send) and command.message.kind is Kind.RUN:
                self._launch(command.message)
            elif isinstance(command, Send) and (command.message.kind, command.message.flags) == _THROWN_AWAY:
                self._throw_away()

    def _throw_away(self) -> None:
        """Every guess is forgotten on purpose, in flight or not: it may be cancelled, and may come again."""
        for run in self.runs.values():
            for written in run.written.values():
                written.dead |= written.position >= len(self.text)

    def _launch(self, message: Message) -> None:
        run = Launched(message, {})
        before = None
        for row in message.rows_as(Row):
            parent = before if message.flags & Flag.CANONICAL else self._at.get(row.parent)
            before = self._at[row.slot] = run.written[row.slot] = Written(row.token, row.position, parent)
            if parent is not None:
                known = self._known.get((parent, row.token))
                before.is_copy = known is not None and not known.dead
                self._known[parent, row.token] = before
            if before.is_copy and not self._may_repeat:
                raise InvariantBroken(f"L2: token {row.token} at position {row.position} is verified twice")
        self.runs[message.run] = run

    def is_dead(self, written: Written | None) -> bool:
        """Whether it, or a token that it descends from, has lost against the text."""
        if self.over:
            return True
        path = list[Written]()
        while written is not None and not written.accepted:
            path.append(written)
            if written.dead:
                break
            written = written.parent
        dead = False
        for written in reversed(path):  # ancestors first
            dead = dead or written.dead
            if not dead and written.position >= len(self.text):
                return False
            dead = dead or self.text[written.position] != written.token
            written.dead, written.accepted = dead, not dead
        return dead

    def is_useless(self, written: Written) -> bool:
        """Whether it is dead, or only tells what is known (rivals send twice), or may have been thrown away."""
        policy = self.spec.policy
        is_known = policy.schedule == "pipeinfer" and written.position + 1 < len(self.text)
        return is_known or (self._may_repeat and not policy.reuse) or self.is_dead(written)


class Reader(Checker):
    """A checker that reads the history."""

    def __init__(self, history: History) -> None:
        self.history = history
