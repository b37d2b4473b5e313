"""L10, where guesses come from: what is sent to be verified was guessed, after these very tokens, by somebody.

A guess that hangs in the wrong place can only cost time and never changes a token.
"""

from __future__ import annotations

from pipeinfer.core.addresses import ORCHESTRATOR, address_name
from pipeinfer.core.messages import NO_SLOT, Nodes, Run, accepted_name
from pipeinfer.core.ports import Command, Emit, Event, Received, Send
from pipeinfer.sim.history import History, InvariantBroken, Reader
from pipeinfer.sim.world import World

Path = int
"""Stands for a sequence of tokens: a hash of the path before its last one, and of that one."""


class Guessed(Reader):
    """Each drafter's nodes by the names it gave them; each slot by the tokens that led to it."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._text: list[Path] = []  # of each accepted token
        self._names: dict[int, dict[int, Path]] = {}  # by drafter and name
        self._guessed: set[Path] = set()
        self._slots: dict[int, Path] = {}

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address != ORCHESTRATOR or world.spec.policy.prompt_lookup:
            return  # what was looked up travels nowhere
        if isinstance(event, Received) and isinstance(event.message.body, Nodes):
            self._received(event.message.source, event.message.body)
        for begun, part in self.history.parts:
            if begun is not None:
                self._text, self._names, self._guessed, self._slots = [], {}, set(), {}
                self._accept(begun.request.prompt)
            for command in part:
                if isinstance(command, Emit):
                    self._accept(command.tokens)
                elif isinstance(command, Send) and isinstance(command.message.body, Run):
                    self._check(command.message.body)

    def _accept(self, tokens: tuple[int, ...]) -> None:
        for token in tokens:
            self._text.append(hash((self._text[-1] if self._text else 0, token)))

    def _received(self, source: int, nodes: Nodes) -> None:
        record = self.history.sequences.get(nodes.sequence)
        if nodes.sequence != self.history.served or record is None or record.over:
            return
        names = self._names.setdefault(source, {})
        for node in nodes.nodes:
            position = node.parent - accepted_name(0)
            parent = self._text[position] if position >= 0 else names.get(node.parent)
            if parent is None:
                who = address_name(source)
                raise InvariantBroken(
                    f"L10: {who} hangs token {node.token} under {node.parent}, a name that it never gave"
                )
            names[node.node] = hash((parent, node.token))
            self._guessed.add(names[node.node])

    def _check(self, run: Run) -> None:
        for row in run.rows:
            if run.is_canonical:
                self._slots[row.slot] = self._text[row.position]
                continue
            before = self._text[row.position - 1] if row.parent == NO_SLOT else self._slots[row.parent]
            path = self._slots[row.slot] = hash((before, row.token))
            if path not in self._guessed and path not in self._text:
                raise InvariantBroken(f"L10: run {run.run}: nobody guessed token {row.token} at {row.position} there")
