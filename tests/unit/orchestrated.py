"""An orchestrator of several requests, and the roles that answer it: word by word, as a test wants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from kvbuffers.slot_table import SlotTable
from pipeinfer.core.addresses import FIRST_DRAFTER, FIRST_STAGE, ORCHESTRATOR, drafter_address, stage_address
from pipeinfer.core.edges import Edges
from pipeinfer.core.messages import (
    NO_TOKEN,
    Body,
    Credit,
    DraftNode,
    Hello,
    Nodes,
    Result,
    ResultRow,
    Row,
    Run,
    SlotOp,
    SlotOpKind,
    Wants,
    accepted_name,
)
from pipeinfer.core.ports import Aborted, Closed, Command, Emit, Event, Finish, Idle, Received, Request, Send, Submitted
from pipeinfer.orchestrator.machine import Orchestrator
from speculation.schedules.policy import Policy

CONTEXT = 64
Kind = TypeVar("Kind")


def scored(position: int) -> float:
    """The log-probability of the token of a prompt at ``position``."""
    return -position / 4


def token_at(position: int) -> int:
    """The target's token at ``position``, whatever comes before it, unless a test says otherwise."""
    return 100 + position


class Head:
    """An orchestrator of ``places`` sessions, with the runs that it has in flight. A stage's table of slots follows it,
    and after each event both are checked. ``is_ready``: whether all roles have said Hello."""

    def __init__(
        self,
        places: int = 2,
        stages: int = 1,
        drafters: int = 0,
        slots: tuple[int, int] | None = None,
        keeps: bool = False,
        is_ready: bool = True,
        **knobs: Any,
    ) -> None:
        guesses: dict[str, Any] = {"topk": 2, "max_ahead": 8, "max_rows": 4} if drafters else {"speculate": False}
        policy = Policy("test", **guesses | knobs)
        self.machine = Orchestrator(
            stages, drafters, policy, CONTEXT, slots=slots, max_num_seqs=places, keeps_prefixes=keeps
        )
        self.allocator = self.machine._allocator
        self._table = SlotTable(self.allocator.capacity)
        roles = [*map(stage_address, range(stages)), *map(drafter_address, range(drafters))]
        self._edges = {address: Edges(address) for address in roles}
        self._last = stage_address(stages - 1)
        self._credits = 0
        self.runs: list[Run] = []
        if is_ready:
            self.ready()

    def ready(self) -> list[Command]:
        return [command for address in self._edges for command in self.says(Hello(0), address)]

    def handle(self, event: Event) -> list[Command]:
        commands = self.machine.handle(event, 0.0)
        self.allocator.check()
        for run in bodies(commands, Run):
            self.runs.append(run)
            self._table.apply(run.ops)
            self._table.allocate(run.rows, run.is_canonical)
            self._table.check()
        return commands

    def says(self, body: Body, source: int = FIRST_STAGE) -> list[Command]:
        return self.handle(Received(self._edges[source].message(ORCHESTRATOR, body)))

    def submit(self, number: int, prompt: Iterable[int], most: int = 3, **more: Any) -> list[Command]:
        return self.handle(Submitted(Request(tuple(prompt), most, **more), number))

    def abort(self, number: int) -> list[Command]:
        return self.handle(Aborted(number))

    def close(self) -> list[Command]:
        return self.handle(Closed())

    def guess(self, sequence: int, root: int, *tokens: int, logp: float = -0.5) -> list[Command]:
        """The drafter's chain of ``tokens`` after the accepted token at position ``root``."""
        names = [accepted_name(root), *range(1000 * root, 1000 * root + len(tokens))]
        nodes = [DraftNode(token, names[index + 1], names[index], logp) for index, token in enumerate(tokens)]
        return self.says(Nodes(sequence, root, False, tuple(nodes)), FIRST_DRAFTER)

    def credit(self) -> list[Command]:
        """The first stage can take one more run."""
        self._credits += 1
        return self.says(Credit(self._credits))

    def back(self, tokens: Mapping[tuple[int, int], int] | None = None) -> list[Command]:
        """The oldest run comes back with the target's ``tokens``, each by its sequence and position."""
        known = tokens or {}
        run = self.runs.pop(0)
        rows = [
            ResultRow(token, row.slot, row.position, -0.5, row.sequence)
            for row in _wanted(run)
            for token in [known.get((row.sequence, row.position + 1), token_at(row.position + 1))]
        ]
        rows += [
            ResultRow(token, row.slot, row.position, scored(row.position + 1), row.sequence)
            for row, token in zip(run.rows, run.next_tokens, strict=False)
            if token != NO_TOKEN
        ]
        return self.says(Result(run.run, rows=tuple(rows)), self._last)

    def skipped(self) -> list[Command]:
        """The oldest run comes back as a tombstone."""
        return self.says(Result(self.runs.pop(0).run, is_tombstone=True), self._last)

    def trip(self) -> list[Command]:
        """A credit, and the oldest run is back."""
        return self.credit() + self.back()

    def until_idle(self) -> list[Command]:
        """All runs come back, until none is left."""
        commands = []
        while self.runs:
            commands += self.trip()
        return commands


def _wanted(run: Run) -> list[Row]:
    """The rows after which ``run`` wants a token: all, none, or the last one of each sequence."""
    if run.wants is Wants.EVERY:
        return list(run.rows)
    return list({row.sequence: row for row in run.rows}.values()) if run.wants is Wants.LAST else []


def bodies(commands: Iterable[Command], kind: type[Kind]) -> list[Kind]:
    """What of ``kind`` was sent."""
    return [one.message.body for one in commands if isinstance(one, Send) and isinstance(one.message.body, kind)]


def answers(commands: Iterable[Command]) -> list[Command]:
    """What the caller hears, and the executor."""
    return [command for command in commands if not isinstance(command, Send)]


def text(commands: Iterable[Command], number: int) -> list[int]:
    """The tokens of request ``number``."""
    return [token for one in commands if isinstance(one, Emit) and one.number == number for token in one.tokens]


def finished(commands: Iterable[Command]) -> list[tuple[int, str]]:
    return [(one.number, one.reason) for one in commands if isinstance(one, Finish)]


def idle(commands: Iterable[Command]) -> list[int]:
    return [one.number for one in commands if isinstance(one, Idle)]


def places(run: Run) -> list[tuple[int, int]]:
    """The rows of ``run``: sequence and position."""
    return [(row.sequence, row.position) for row in run.rows]


def operations(runs: Iterable[Run], kind: SlotOpKind) -> list[SlotOp]:
    return [op for run in runs for op in run.ops if op.kind is kind]
