"""What happened in a world, derived from its messages and emissions alone: the reference of the invariants."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from pipeinfer.core.addresses import FIRST_STAGE, ORCHESTRATOR
from pipeinfer.core.messages import Advance, Run, Settings
from pipeinfer.core.ports import Command, Emit, Event, Finish, Idle, Request, Send, Submitted
from pipeinfer.sim.world import Checker, World, WorldSpec
from stages.models.emulated import EmulatedSpec, plain_answer


class InvariantBroken(AssertionError):
    """An invariant does not hold; the message begins with its number."""


@functools.lru_cache(maxsize=64)
def ending(model: EmulatedSpec, request: Request) -> tuple[tuple[int, ...], int | None]:
    """What plain decoding answers, and the layer by whose numbers it ends, if any; worlds are often run more than
    once."""
    tokens, fault = plain_answer(model, request.prompt, request.max_new_tokens, request.stop_tokens, request.sampling)
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
    """A run as it left the orchestrator, and the canonical and leased slots of its sequence after it."""

    run: Run
    record: SequenceRecord
    written: dict[int, Written]
    canonical: int = 0
    leased: frozenset[int] = frozenset()


@dataclass(slots=True, eq=False)
class SequenceRecord:
    """One sequence, by the orchestrator's messages and emissions. ``at``: what was last written to a slot."""

    sequence: int
    number: int  # of its request
    request: Request
    text: list[int]  # the prompt and what has been emitted
    truth: list[int]  # the prompt and what ought to be emitted
    fault: int | None  # the layer by whose numbers the request ought to end
    over: bool = False
    has_begun: bool = False  # whether a token has been emitted
    at: dict[int, Written] = field(default_factory=dict)
    known: dict[tuple[Written, int], Written] = field(default_factory=dict)  # tokens sent after what

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


Part = tuple[SequenceRecord | None, list[Command]]
"""The sequence that begins, if one does, and the commands about it or about the one before."""


class History(Checker):
    """What has happened, from messages and emissions alone; the other checkers read it."""

    def __init__(self, spec: WorldSpec) -> None:
        self.spec = spec
        self.sequences: dict[int, SequenceRecord] = {}  # the newest one, and others until their requests are idle
        self.runs: dict[int, Launched] = {}  # of those sequences
        self.now: SequenceRecord | None = None  # the newest sequence
        self.served = 0  # the id of the newest sequence before the orchestrator's last event
        self.parts: list[Part] = []  # the orchestrator's last commands, see _part
        self._waiting: dict[int, Request] = {}  # requests whose sequence has not begun, by number
        # A restart is visible here as a message to drafters; without drafters there is no such message.
        self.may_repeat = spec.policy.schedule == "pipeinfer" or (not spec.policy.reuse and spec.drafters == 0)

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address != ORCHESTRATOR:
            return
        if isinstance(event, Submitted):
            self._waiting[event.number] = event.request
        self.served = self.now.sequence if self.now else 0
        self.parts = [(None, [])]
        for command in commands:
            self._read(command)

    def _read(self, command: Command) -> None:
        """A sequence begins with its settings; a command about a request that only waits belongs to none."""
        if isinstance(command, Emit | Finish | Idle):
            record = next((record for record in self.sequences.values() if record.number == command.number), None)
            if record is None:
                self._waiting.pop(command.number, None)
                return
            self._received(record, command)
        elif isinstance(command, Send):
            self._sent(command)
        self.parts[-1][1].append(command)

    def _received(self, record: SequenceRecord, command: Emit | Finish | Idle) -> None:
        if isinstance(command, Emit):
            record.text += command.tokens
            record.has_begun = True
        elif isinstance(command, Finish):
            record.over = True
        elif record is not self.now:
            self._forget(record)

    def _sent(self, send: Send) -> None:
        match send.message.body:
            case Settings() as settings if send.message.dest == FIRST_STAGE:
                self._begin(settings.sequence)
            case Run() as run:
                self._launch(run)
            case Advance(sequence=sequence, restart=True):
                self._throw_away(self.sequences[sequence])

    def _begin(self, sequence: int) -> None:
        if not self._waiting:
            raise InvariantBroken(f"L2: sequence {sequence} begins, and no request waits")
        number = next(iter(self._waiting))
        request = self._waiting.pop(number)
        tokens, fault = ending(self.spec.model, request)
        text, truth = list(request.prompt), [*request.prompt, *tokens]
        before, self.now = self.now, SequenceRecord(sequence, number, request, text, truth, fault)
        if before is not None and not self.spec.overlap:
            self._forget(before)
        self.sequences[sequence] = self.now
        self.parts.append((self.now, []))

    def _forget(self, record: SequenceRecord) -> None:
        self.sequences.pop(record.sequence, None)
        self.runs = {number: run for number, run in self.runs.items() if run.record is not record}

    def _throw_away(self, record: SequenceRecord) -> None:
        """Every guess is forgotten on purpose, in flight or not: it may be cancelled, and may come again."""
        for run in self.runs.values():
            for written in run.written.values() if run.record is record else ():
                written.dead |= written.position >= len(record.text)

    def _launch(self, run: Run) -> None:
        ids = {row.sequence for row in run.rows}
        if not ids <= self.sequences.keys() or len(ids) != 1:
            raise InvariantBroken(f"L2: run {run.run} is of the sequences {sorted(ids)}, known are {[*self.sequences]}")
        record = self.sequences[ids.pop()]
        launched = self.runs[run.run] = Launched(run, record, {})
        before = None
        for row in run.rows:
            parent = before if run.is_canonical else record.at.get(row.parent)
            before = record.at[row.slot] = launched.written[row.slot] = Written(row.token, row.position, parent)
            if parent is not None:
                known = record.known.get((parent, row.token))
                before.is_copy = known is not None and not known.dead
                record.known[parent, row.token] = before
            if before.is_copy and not self.may_repeat:
                raise InvariantBroken(f"L2: token {row.token} at position {row.position} is verified twice")

    def is_useless(self, record: SequenceRecord, written: Written) -> bool:
        """Whether it is dead, or only repeats what is known (rivals send twice), or may have been thrown away."""
        policy = self.spec.policy
        is_known = policy.schedule == "pipeinfer" and written.position + 1 < len(record.text)
        return is_known or (self.may_repeat and not policy.reuse) or record.is_dead(written)


class Reader(Checker):
    """A checker that reads the history."""

    def __init__(self, history: History) -> None:
        self.history = history
