"""Runs in flight, as the orchestrator knows them: they come back in the order in which they left."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import Cancelled, Result, ResultRow, fault_layer
from pipeinfer.orchestrator.session import Session
from speculation.trees.tree import Node


@dataclass(slots=True)
class InFlight:
    """A run in flight: whose it is, the nodes it carries, and those that it carries once more (see Launch)."""

    number: int
    session: Session
    nodes: list[Node] = field(default_factory=list)
    copies: list[Node] = field(default_factory=list)
    is_prefill: bool = False
    is_canonical: bool = False
    carries_root: bool = False
    launched_at: float = 0.0
    cancelled_at: float | None = None

    def hear(self, result: Result) -> int | None:
        """Take the result of this run, not skipped: each node gets the target's token after it. For a run of the
        prompt, returns the layer whose numbers are not finite, if any. Raises RemoteProtocolError where a living row is
        missing."""
        choices: dict[int | None, ResultRow] = {row.slot: row for row in result.rows}
        for node in self.nodes:
            choice = choices.get(node.slot)
            if choice is not None:
                node.choice, node.choice_logp = choice.token, choice.logp
            elif node.alive:
                raise RemoteProtocolError(f"run {self.number} came back without its row at position {node.position}")
        faulty = [row.token for row in choices.values() if row.token < 0] if self.is_prefill else []
        return fault_layer(faulty[0]) if faulty else None

    def is_of_use(self, root: Node) -> bool:
        """Whether the target's token after any of its rows may still be of use, the tree being at ``root``."""
        return any(node.alive and node.position >= root.position for node in (*self.nodes, *self.copies))


class Flight:
    """All of them, oldest first."""

    def __init__(self) -> None:
        self._runs: deque[InFlight] = deque()
        self._launched = 0

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[InFlight]:
        return iter(self._runs)

    def launch(self, session: Session, now: float, is_prefill: bool = False, is_canonical: bool = False) -> InFlight:
        """A new run of ``session``, which leaves ``now``."""
        self._launched += 1
        run = InFlight(self._launched, session, is_prefill=is_prefill, is_canonical=is_canonical, launched_at=now)
        self._runs.append(run)
        return run

    def land(self, number: int) -> InFlight:
        """Run ``number`` is back. Raises RemoteProtocolError if it is another one's turn."""
        expected = self._runs[0].number if self._runs else "none"
        if number != expected:
            raise RemoteProtocolError(f"result of run {number}, expected {expected}")
        return self._runs.popleft()

    def losses(self, root: Node, died: Sequence[Node]) -> tuple[list[InFlight], list[Cancelled]]:
        """The runs that are of no use any more, the tree being at ``root``, and of ``died`` the rows of others."""
        living = [
            run for run in self._runs if run.cancelled_at is None and not run.is_prefill and not run.session.is_over
        ]
        dead = [run for run in living if not run.is_canonical and not run.is_of_use(root)]
        kept = {run.number: run.session.sequence for run in living}
        for run in dead:
            del kept[run.number]
        lost = [(node.run, node.slot) for node in died if node.run in kept and node.slot is not None]
        return dead, [Cancelled(run, slot, kept[run]) for run, slot in lost if run is not None]

    def __str__(self) -> str:
        return f"runs {self._runs[0].number} to {self._runs[-1].number} in flight" if self else "nothing in flight"
