"""Runs in flight, as the orchestrator knows them: they come back in the order in which they left."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import Cancelled, Result, ResultRow, fault_layer
from pipeinfer.core.ports import Command, Score
from pipeinfer.orchestrator.session import Session
from speculation.trees.tree import Node


@dataclass(slots=True)
class InFlight:
    """A run in flight: whose rows it has, the nodes it carries, and those that it carries once more (see Launch).

    ``prompts``: slots of prompt rows, by sequence. ``scored``: those after which the log-probability of the prompt's
    next token is wanted. ``carries_root``: whether it carries the root of a tree of that time, prompts aside.
    ``living``: nodes whose results may be of use."""

    number: int
    sessions: list[Session] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    copies: list[Node] = field(default_factory=list)
    prompts: dict[int, list[int]] = field(default_factory=dict)
    scored: dict[int, list[int]] = field(default_factory=dict)
    carries_root: bool = False
    rows: int = 0
    is_prefill: bool = False
    is_canonical: bool = False
    launched_at: float = 0.0
    cancelled_at: float | None = None
    living: int = 0

    def account(self, result: Result, now: float, stages: int) -> None:
        """Count what came of this run, which passed ``stages`` stages and is back ``now``, for its sessions."""
        for session in self.sessions:
            if result.is_tombstone:
                session.stats.tombstones += 1
                session.stats.cancel_s += 0.0 if self.cancelled_at is None else now - self.cancelled_at
            if not (self.is_prefill or session.is_over):
                session.stats.busy_s += 1e-6 * result.work_us / stages / len(self.sessions)

    def hear(self, result: Result, sequences: Container[int]) -> dict[int, int | None]:
        """Take the result of this run: each node of ``sequences`` gets the target's token after it. Returns the
        sequences whose prompts have rows with numbers that are not finite, with the first layer that is to blame.
        Raises RemoteProtocolError where a living row is missing, unless the run was skipped."""
        if result.is_tombstone:
            return {}
        choices: dict[int | None, ResultRow] = {row.slot: row for row in result.rows}
        tops = {row.slot: top for row, top in zip(result.rows, result.tops(), strict=True)} if result.top else {}
        for node in self.nodes:
            if node.sequence not in sequences:
                continue
            choice = choices.get(node.slot)
            if choice is not None:
                node.choice, node.choice_logp = choice.token, choice.logp
                node.choice_top = tops.get(choice.slot, ())
            elif node.alive:
                raise RemoteProtocolError(f"run {self.number} came back without its row at position {node.position}")
        faulty = [row for row in reversed(result.rows) if row.token < 0] if self.is_prefill else []
        return {row.sequence: fault_layer(row.token) for row in faulty}

    def scores(self, result: Result, session: Session) -> list[Command]:
        """The log-probabilities in the result of this run of tokens of the prompt of ``session``, if it has any. Raises
        RemoteProtocolError where one is missing."""
        slots = self.scored.get(session.sequence)
        if not slots:
            return []
        found = {row.slot: (row.logp, top) for row, top in zip(result.rows, result.tops(), strict=True)}
        if not found.keys() >= set(slots):
            raise RemoteProtocolError(f"run {self.number} came back without rows of the prompt that was to be scored")
        session.scored += len(slots)
        logps, tops = zip(*[found[slot] for slot in slots], strict=True)
        has_tops = bool(session.request.sampling.prompt_logprobs)
        return [Score(logps, session.caller_number, tops if has_tops else ())]


class Flight:
    """All of them, oldest first."""

    def __init__(self) -> None:
        self._runs: deque[InFlight] = deque()
        self._by_number: dict[int, InFlight] = {}
        self._launched = 0

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[InFlight]:
        return iter(self._runs)

    def launch(self, sessions: list[Session], nodes: list[Node], copies: list[Node], now: float) -> InFlight:
        """A new run of ``sessions`` with ``nodes`` and ``copies``, which leaves ``now``."""
        self._launched += 1
        run = InFlight(self._launched, sessions, nodes, copies, launched_at=now, living=len(nodes))
        for node in nodes:
            node.run = run.number
        for session in sessions:
            session.runs += 1
        self._runs.append(run)
        self._by_number[run.number] = run
        return run

    def land(self, number: int) -> InFlight:
        """Run ``number`` is back. Raises RemoteProtocolError if it is another one's turn."""
        expected = self._runs[0].number if self._runs else "none"
        if number != expected:
            raise RemoteProtocolError(f"result of run {number}, expected {expected}")
        run = self._runs.popleft()
        del self._by_number[number]
        for session in run.sessions:
            session.runs -= 1
        return run

    def losses(self, died: Iterable[Node], roots: Mapping[int, Node]) -> tuple[list[InFlight], list[Cancelled]]:
        """The runs that are of no use now that ``died`` have died, and the dead rows of others. ``roots``: of the trees
        of all sequences that are decoded."""
        lost: list[tuple[InFlight, Node]] = []
        for node in died:
            run = self._by_number.get(node.run or 0)
            if run is not None and node.slot is not None:
                run.living -= 1
                lost.append((run, node))
        repeated = [run for run in self._runs if run.copies]  # a copy may have died that another run carries
        dead = []
        for run in {run.number: run for run in [*repeated, *(run for run, _ in lost)]}.values():
            if run.cancelled_at is None and not run.is_canonical and not run.living and not _has_use(run.copies, roots):
                dead.append(run)
        gone = {run.number for run in dead}
        rows = [
            Cancelled(run.number, node.slot or 0, node.sequence)
            for run, node in lost
            if run.cancelled_at is None
            and run.number not in gone
            and (node.sequence in roots or len(run.sessions) > 1)  # of a run that is all of one that is over, none
        ]
        return sorted(dead, key=lambda run: run.number), rows

    def doomed(self, session: Session) -> tuple[list[InFlight], list[Cancelled]]:
        """What is of no use now that ``session`` is over, all but its root. A later run may carry the commit of the
        root's slot, so the root's row has to be written everywhere. Where the end of its prompt left with others, the
        chunks before are not skipped: rows of a prompt follow all rows before them, and those in a run that goes on may
        be computed in spite of this advice."""
        root, sequence = session.tree.root, session.sequence
        dead, rows = [], list[Cancelled]()
        for run in self._runs:
            if run.cancelled_at is not None or session not in run.sessions:
                continue
            if len(run.sessions) == 1:
                if run.is_prefill or run.number != root.run:
                    dead.append(run)
                continue
            mine = [node for node in run.nodes if node.sequence == sequence and node.alive]
            slots = run.prompts.pop(sequence, None) or [node.slot or 0 for node in mine if node is not root]
            run.living -= len(mine) - (root in mine and not run.is_prefill)
            if run.living or run.is_canonical:
                dead = [] if run.is_prefill else dead
                rows += [Cancelled(run.number, slot, sequence) for slot in slots]
            else:
                dead.append(run)
        return dead, rows

    def __str__(self) -> str:
        return f"runs {self._runs[0].number} to {self._runs[-1].number} in flight" if self else "nothing in flight"


def _has_use(nodes: Sequence[Node], roots: Mapping[int, Node]) -> bool:
    """Whether the target's token after any of ``nodes`` may still be of use."""
    return any(
        node.alive and node.sequence in roots and node.position >= roots[node.sequence].position for node in nodes
    )
