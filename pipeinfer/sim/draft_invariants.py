"""L10, where guesses come from: what is sent to be verified was guessed, after these very tokens, by somebody.

A guess that hangs in the wrong place can only cost time and never changes a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeinfer.core.addresses import ORCHESTRATOR, address_name
from pipeinfer.core.messages import NO_SLOT, Nodes, Run, accepted_name
from pipeinfer.core.ports import Command, Emit, Event, Received, Send
from pipeinfer.sim.history import History, InvariantBroken, Reader, SequenceRecord
from pipeinfer.sim.world import World

Path = int
"""Stands for a sequence of tokens: a hash of the path before its last one, and of that one."""


@dataclass(slots=True)
class _Guesses:
    """Of one sequence: the path of each accepted token, each drafter's nodes by name, what was guessed, its slots."""

    text: list[Path] = field(default_factory=list)
    names: dict[tuple[int, int], Path] = field(default_factory=dict)  # by drafter and name
    guessed: set[Path] = field(default_factory=set)
    slots: dict[int, Path] = field(default_factory=dict)

    def accept(self, tokens: Iterable[int]) -> None:
        """The text goes on by ``tokens``."""
        for token in tokens:
            self.text.append(hash((self.text[-1] if self.text else 0, token)))


class Guessed(Reader):
    """Each drafter's nodes by the names it gave them; each slot by the tokens that led to it."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._guesses: dict[int, _Guesses] = {}  # by sequence

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address != ORCHESTRATOR or world.spec.policy.prompt_lookup:
            return  # what was looked up travels nowhere
        if isinstance(event, Received) and isinstance(event.message.body, Nodes):
            self._received(event.message.source, event.message.body)
        for record, command, begins in self.history.told:
            if begins:
                self._guesses[record.sequence] = _Guesses()
                self._guesses[record.sequence].accept(record.prompt)
            if isinstance(command, Emit):
                self._guesses[record.sequence].accept(command.tokens)
            elif isinstance(command, Send) and isinstance(command.message.body, Run):
                self._check(record, command.message.body)
        if len(self._guesses) > len(self.history.sequences):
            known = self.history.sequences
            self._guesses = {one: guesses for one, guesses in self._guesses.items() if one in known}

    def _received(self, source: int, nodes: Nodes) -> None:
        record, mine = self.history.sequences.get(nodes.sequence), self._guesses.get(nodes.sequence)
        if record is None or mine is None or not record.is_living:
            return
        for node in nodes.nodes:
            position = node.parent - accepted_name(0)
            known = mine.text[position : position + 1] if position >= 0 else [mine.names.get((source, node.parent))]
            parent = known[0] if known else None
            if parent is None:
                who = address_name(source)
                raise InvariantBroken(
                    f"L10: {who} hangs token {node.token} under {node.parent}, a name that it never gave"
                )
            path = mine.names[source, node.node] = hash((parent, node.token))
            mine.guessed.add(path)

    def _check(self, record: SequenceRecord, run: Run) -> None:
        mine = self._guesses[record.sequence]
        for row in run.rows:
            if row.sequence != record.sequence:
                continue
            if run.is_canonical:
                mine.slots[row.slot] = mine.text[row.position]
                continue
            before = mine.slots.get(row.parent)  # a slot that came with a FORK is canonical
            if before is None or row.parent == NO_SLOT:
                before = mine.text[row.position - 1]
            path = mine.slots[row.slot] = hash((before, row.token))
            if path not in mine.guessed and path not in mine.text:
                raise InvariantBroken(f"L10: run {run.run}: nobody guessed token {row.token} at {row.position} there")
