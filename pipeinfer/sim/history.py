"""What happened in a world, derived from its messages and emissions alone: the reference of the invariants.

Many sequences may live at once. A command is *told of* every sequence that it is about: a run of each one that has rows
in it, an emission of the one that its request has then. A sequence begins with its settings; it is that of the first
request, by priority and arrival, that is not over and has no sequence. A request may lose its sequence before it is
over (preemption, which is noted): then another one begins with all its tokens, the prompt's and the emitted ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeinfer.core.addresses import FIRST_STAGE, ORCHESTRATOR
from pipeinfer.core.messages import (
    NO_SLOT,
    Advance,
    Cancel,
    Close,
    DraftOrder,
    Prompt,
    Row,
    Run,
    Settings,
    SlotOp,
    SlotOpKind,
)
from pipeinfer.core.ports import Command, Emit, Event, Finish, Idle, Note, Request, SampledToken, Send, Submitted
from pipeinfer.sim.world import Checker, World, WorldSpec
from stages.models.emulated import EmulatedSpec, plain_answer, plain_scores

PREEMPTED = "preempt request "
"""How a note about a preemption begins."""


class InvariantBroken(AssertionError):
    """An invariant does not hold; the message begins with its number."""


@functools.lru_cache(maxsize=64)
def ending(model: EmulatedSpec, request: Request) -> tuple[tuple[int, ...], int | None]:
    """What plain decoding answers, and the layer by whose numbers it ends, if any; worlds are often run more than
    once. The row of a prompt's last token is computed also where no new token is wanted."""
    prompt, most, sampling = request.prompt, request.max_new_tokens, request.sampling
    fault = None if sampling.prompt_logprobs is None else plain_scores(model, prompt, 0)[1]
    if fault is not None:
        return (), fault
    tokens, fault = plain_answer(model, prompt, max(1, most), request.stop_tokens, sampling)
    return tuple(tokens[:most]), fault


def oracle(model: EmulatedSpec, request: Request) -> tuple[int, ...]:
    """The tokens that plain decoding answers."""
    return ending(model, request)[0]


@functools.lru_cache(maxsize=64)
def scores(model: EmulatedSpec, request: Request) -> list[tuple[float, tuple[SampledToken, ...]]]:
    """The log-probability of each token of the prompt but the first, and the most probable tokens in its place, if
    ``request`` wants them."""
    tops = request.sampling.prompt_logprobs
    found = [] if tops is None else plain_scores(model, request.prompt, tops)[0]
    return [(logp, tuple(most)) for (_, logp), *most in found]


@dataclass(slots=True, eq=False)
class Written:
    """A token as a run wrote it to a slot; its fate is remembered once it is known."""

    record: SequenceRecord
    token: int
    slot: int
    position: int
    parent: Written | None
    is_copy: bool = False  # another slot holds the same token after the same ones
    accepted: bool = False
    dead: bool = False
    doubtful: bool = False  # it may have been thrown away, and may be kept


class Held(NamedTuple):
    """How many canonical slots a sequence has, and its leased slots."""

    canonical: int = 0
    leased: frozenset[int] = frozenset()


@dataclass(slots=True, eq=False)
class Launched:
    """A run as it left the orchestrator, its sequences, and what every sequence holds after it."""

    run: Run
    records: dict[int, SequenceRecord]
    written: dict[int, Written]
    after: dict[int, Held] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class SequenceRecord:
    """One sequence, by the orchestrator's messages and emissions. ``at``: what was last written to a slot."""

    sequence: int
    number: int  # of its request
    request: Request
    rank: tuple[int, int]  # the lowest is served first, and loses its sequence last
    prompt: tuple[int, ...]  # of the sequence: a preempted request begins again with what it had emitted
    text: list[int]  # the prompt and what has been emitted
    truth: list[int]  # the prompt and what ought to be emitted
    fault: int | None  # the layer by whose numbers the request ought to end
    over: bool = False
    dropped: bool = False  # freed or closed, perhaps before its request is over
    freed: bool = False
    has_begun: bool = False  # whether a token has been emitted
    at: dict[int, Written] = field(default_factory=dict)
    canonical: list[int] = field(default_factory=list)  # its slots, in order of position
    known: dict[tuple[Written, int], Written] = field(default_factory=dict)  # tokens sent after what

    @property
    def is_living(self) -> bool:
        """Whether tokens may still come of it."""
        return not self.over and not self.dropped

    def is_dead(self, written: Written | None) -> bool:
        """Whether it, or a token that it descends from, has lost against the text."""
        if self.over or self.dropped:
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


class Told(NamedTuple):
    """A command, and a sequence that it is about. ``begins``: it is the first one about it."""

    record: SequenceRecord
    command: Command
    begins: bool = False


@dataclass(slots=True)
class _Asked:
    """A request that is not idle, and its newest sequence. ``rank``: its place among those that wait."""

    request: Request
    rank: tuple[int, int]
    record: SequenceRecord | None = None
    over: bool = False


class History(Checker):
    """What has happened, from messages and emissions alone; the other checkers read it."""

    def __init__(self, spec: WorldSpec) -> None:
        self.spec = spec
        self.sequences: dict[int, SequenceRecord] = {}  # until they are freed and their requests idle
        self.runs: dict[int, Launched] = {}  # of those sequences
        self.told: list[Told] = []  # the orchestrator's last commands
        self._asked: dict[int, _Asked] = {}  # by number
        self._arrivals = 0
        self._begun = 0  # the newest sequence
        self._leaving: set[int] = set()  # sequences that the orchestrator's last commands free or close
        self._gone: list[SequenceRecord] = []  # to be forgotten at its next event
        # A restart is visible here as a message to drafters; without drafters there is no such message.
        self.may_repeat = spec.policy.schedule == "pipeinfer" or (not spec.policy.reuse and spec.drafters == 0)

    @property
    def living(self) -> list[SequenceRecord]:
        """The sequences of which tokens may still come, in the order in which they began."""
        return [record for record in self.sequences.values() if record.is_living]

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address != ORCHESTRATOR:
            return
        if isinstance(event, Submitted):
            self._arrivals += 1
            self._asked[event.number] = _Asked(event.request, (event.request.priority, self._arrivals))
        self._forget()
        self.told = []
        self._leaving = set(_left(commands))
        for command in commands:
            if isinstance(command, Emit | Finish | Idle):
                self._received(command)
            elif isinstance(command, Send):
                self._sent(command)
            elif isinstance(command, Note) and command.what.startswith(PREEMPTED):
                self._preempted(int(command.what.removeprefix(PREEMPTED)))
        if not self.spec.policy.reuse:
            self._restarted_untold(commands)

    def _restarted_untold(self, commands: Iterable[Command]) -> None:
        """While no guesses are wanted, drafters hear of a restart later: each emission may be one, or none."""
        sent = [command.message.body for command in commands if isinstance(command, Send)]
        informed = {body.sequence for body in sent if isinstance(body, Advance)}
        for told in self.told:
            if isinstance(told.command, Emit) and told.record.sequence not in informed:
                for written in self._guesses(told.record):
                    written.doubtful = True

    def _preempted(self, number: int) -> None:
        """The sequence is freed by the next run at the latest, as slot_invariants.py demands."""
        record = self._asked[number].record
        if record is None or not record.is_living:
            raise InvariantBroken(f"L2: request {number} is preempted, and has no sequence")
        record.dropped = True

    # What the user receives.

    def _received(self, command: Emit | Finish | Idle) -> None:
        """A command about a request that only waits is told of no sequence."""
        asked = self._asked.get(command.number)
        record = asked.record if asked else None
        if isinstance(command, Emit):
            if record is None or not record.is_living:
                raise InvariantBroken(f"L2: request {command.number} emits {command.tokens} out of turn")
            record.text += command.tokens
            record.has_begun = True
        elif isinstance(command, Finish):
            if asked is not None:
                asked.over = True
            if record is not None:
                record.over = True
        else:
            self._asked.pop(command.number, None)
            mine = [record for record in self.sequences.values() if record.number == command.number]
            self._gone += [record for record in mine if record.freed or not record.at]
        if record is not None:
            self.told.append(Told(record, command))

    def _forget(self) -> None:
        for record in self._gone:
            self.sequences.pop(record.sequence, None)
        if self._gone:
            self._gone = []
            self.runs = {
                number: launched
                for number, launched in self.runs.items()
                if not self.sequences.keys().isdisjoint(launched.records)
            }

    # What the roles are sent.

    def _sent(self, send: Send) -> None:
        begins = False
        match send.message.body:
            case Settings() as settings:
                begins = send.message.dest == FIRST_STAGE
                if begins:
                    self._begin(settings.sequence)
                about = {settings.sequence}
            case Run() as run:
                self._launch(run)
                about = {row.sequence for row in run.rows}
            case Cancel(rows=rows):
                about = {row.sequence for row in rows}
            case Prompt(sequence=sequence) | Advance(sequence=sequence) | DraftOrder(sequence=sequence):
                about = {sequence}
                if isinstance(send.message.body, Advance) and send.message.body.restart:
                    for written in self._guesses(self.sequences[sequence]):
                        written.dead = True  # thrown away on purpose: it may be cancelled, and may come again
            case Close(sequence=sequence):
                about = {sequence}
                if sequence in self.sequences:
                    self.sequences[sequence].dropped = True
            case _:
                return
        self.told += [Told(self.sequences[one], send, begins) for one in sorted(about) if one in self.sequences]

    def _begin(self, sequence: int) -> None:
        """The first request that is not over and has no sequence has this one from now on."""
        waiting = [number for number, asked in self._asked.items() if self._wants_sequence(asked)]
        if not waiting or sequence <= self._begun:
            raise InvariantBroken(f"L2: sequence {sequence} begins, and no request waits for it")
        number = min(waiting, key=lambda number: self._asked[number].rank)
        asked, self._begun = self._asked[number], sequence
        request, before = asked.request, asked.record
        if before is not None:
            before.dropped = True
        tokens, fault = ending(self.spec.model, request)
        text, truth = list(before.text if before else request.prompt), [*request.prompt, *tokens]
        asked.record = SequenceRecord(sequence, number, request, asked.rank, tuple(text), text, truth, fault)
        self.sequences[sequence] = asked.record

    def _wants_sequence(self, asked: _Asked) -> bool:
        record = asked.record
        return not asked.over and (record is None or record.dropped or record.sequence in self._leaving)

    def _guesses(self, record: SequenceRecord) -> Iterator[Written]:
        """What runs in flight have beyond the text."""
        for launched in self.runs.values():
            for written in launched.written.values() if record.sequence in launched.records else ():
                if written.record is record and written.position >= len(record.text):
                    yield written

    def _launch(self, run: Run) -> None:
        ids = {row.sequence for row in run.rows}
        if not ids or not ids <= self.sequences.keys():
            raise InvariantBroken(f"L2: run {run.run} is of the sequences {sorted(ids)}, known are {[*self.sequences]}")
        if sorted(row.sequence for row in run.rows) != [row.sequence for row in run.rows]:
            raise InvariantBroken(f"L2: the rows of run {run.run} are not in the order of their sequences: {run.rows}")
        for op in run.ops:
            self._apply(op, run.run)
        launched = self.runs[run.run] = Launched(run, {one: self.sequences[one] for one in sorted(ids)}, {})
        for row in run.rows:
            launched.written[row.slot] = self._write(launched.records[row.sequence], row, run)

    def _apply(self, op: SlotOp, number: int) -> None:
        """Keep in mind which slots are canonical; whether they may be is for slot_invariants.py to say."""
        record = self.sequences.get(op.sequence)
        if record is None:
            return
        if op.kind is SlotOpKind.COMMIT:
            record.canonical += range(op.slot, op.slot + op.length)
        elif op.kind is SlotOpKind.TRUNCATE:
            del record.canonical[op.length :]
        elif op.kind is SlotOpKind.FREE:
            record.dropped = record.freed = True
            if record.number not in self._asked:
                self._gone.append(record)
        elif op.kind is SlotOpKind.FORK:
            self._fork(op, record, number)

    def _fork(self, op: SlotOp, record: SequenceRecord, number: int) -> None:
        """The new sequence has the first slots of another one, which hold what its own prompt begins with."""
        source = self.sequences.get(op.slot)
        if source is None or source.freed or len(source.canonical) < op.length or record.canonical:
            raise InvariantBroken(f"L3: run {number} carries {op}, which cannot be done")
        record.canonical = source.canonical[: op.length]
        for slot in record.canonical:
            record.at[slot] = source.at[slot]
            record.at[slot].accepted = True

    def _write(self, record: SequenceRecord, row: Row, run: Run) -> Written:
        parent = record.at.get(row.parent)
        if run.is_canonical or row.parent == NO_SLOT:
            parent = record.at.get(record.canonical[-1]) if record.canonical else None
        written = record.at[row.slot] = Written(record, row.token, row.slot, row.position, parent)
        if run.is_canonical:
            self._compare_prompt(record, row, run)
            record.canonical.append(row.slot)
        if parent is not None:
            known = record.known.get((parent, row.token))
            written.is_copy = known is not None and not (known.dead or known.doubtful)
            record.known[parent, row.token] = written
        if written.is_copy and not self.may_repeat:
            raise InvariantBroken(f"L2: token {row.token} at position {row.position} is verified twice")
        return written

    def _compare_prompt(self, record: SequenceRecord, row: Row, run: Run) -> None:
        prompt = record.prompt
        if row.position < len(prompt) and row.token == prompt[row.position]:
            return
        wanted = f"{prompt[row.position]}" if row.position < len(prompt) else "no token"
        what = f"run {run.run} has token {row.token} at {row.position} of the prompt of request {record.number}"
        again = len(prompt) > len(record.request.prompt)
        raise InvariantBroken(f"{'L1' if again else 'L2'}: {what}, which has {wanted} there")

    def is_useless(self, written: Written) -> bool:
        """Whether it is dead, or only repeats what is known (rivals send twice), or may have been thrown away."""
        policy, record = self.spec.policy, written.record
        is_known = policy.schedule == "pipeinfer" and written.position + 1 < len(record.text)
        may_be_gone = written.doubtful or (self.may_repeat and not policy.reuse)
        return is_known or may_be_gone or record.is_dead(written)


def _left(commands: Iterable[Command]) -> Iterable[int]:
    """The sequences that ``commands`` free or close."""
    for command in commands:
        if isinstance(command, Send) and isinstance(command.message.body, Close):
            yield command.message.body.sequence
        elif isinstance(command, Send) and isinstance(command.message.body, Run):
            yield from (op.sequence for op in command.message.body.ops if op.kind is SlotOpKind.FREE)


class Reader(Checker):
    """A checker that reads the history."""

    def __init__(self, history: History) -> None:
        self.history = history
