"""L8: every queue, window, tree and buffer with its bound. Peeks into private attributes, as it must."""

from __future__ import annotations

from collections.abc import Iterator

from kvbuffers.slot_allocator import SlotAllocator
from pipeinfer.core.addresses import FIRST_DRAFTER, address_name
from pipeinfer.core.messages import MAX_OPS, Run
from pipeinfer.core.ports import Command, Compute, Event, Machine, Send
from pipeinfer.orchestrator.machine import RUNS_AHEAD, Orchestrator
from pipeinfer.orchestrator.pool import LEAST_SHARED
from pipeinfer.sim.history import InvariantBroken
from pipeinfer.sim.world import Checker, World, WorldSpec, make_job_spec
from speculation.drafter.machine import Drafter
from speculation.trees.tree import SLACK, Tree, descendants
from stages.stage.machine import Stage

STRIDE = 16
"""Trees are counted at every so many events of a role, and when a request is idle."""


class Bounds(Checker):
    """L8."""

    def __init__(self, spec: WorldSpec) -> None:
        self.spec = spec
        self._count = 0

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        self._count += 1
        if self._count % STRIDE == 0:
            self._count_nodes(world.machine(address))
        for what, value, most in _bounds(world.machine(address), self.spec):
            if not 0 <= value <= most:
                raise InvariantBroken(f"L8: {what} of {address_name(address)}: {value}, the bound is {most}")
        self._check_positions(address, commands)
        self._check_host(world, address)
        self._check_rows(world.orchestrator, commands)

    def _count_nodes(self, machine: Machine) -> None:
        """A bound on a size is worth what the size is worth."""
        trees = [one.tree for one in machine._sessions.values()] if isinstance(machine, Orchestrator) else []
        if isinstance(machine, Drafter):
            trees = [sequence.tree for sequence in machine._sequences.values() if sequence.tree is not None]
        for tree in trees:
            if tree.size != 1 + len(descendants(tree.root)):
                raise InvariantBroken(f"L8: the tree of {address_name(machine.address)} is not of the size {tree.size}")

    def _check_rows(self, machine: Orchestrator, commands: list[Command]) -> None:
        """A row is of use up to the last position whose choice may be emitted."""
        last = {sequence: session.last_position for sequence, session in machine._sessions.items()}
        for command in commands:
            if isinstance(command, Send) and isinstance(command.message.body, Run):
                for row in command.message.body.rows:
                    if row.position > last.get(row.sequence, row.position):
                        run = command.message.body.run
                        raise InvariantBroken(f"L8: run {run} has {row}, the last of use is {last[row.sequence]}")

    def _check_positions(self, address: int, commands: list[Command]) -> None:
        """A draft evaluates nothing beyond the positions that it was made for."""
        limits = dict(enumerate(self.spec.draft_contexts, FIRST_DRAFTER))
        for command in commands if limits.get(address) else ():
            if isinstance(command, Compute) and command.batch.positions.max() >= limits[address]:
                raise InvariantBroken(
                    f"L8: {address_name(address)} is made for {limits[address]} positions: {command.batch}"
                )

    def _check_host(self, world: World, address: int) -> None:
        """What waits on a rank: a few local messages about each sequence, and those that came during a layer. A stage
        has at most a window of runs there; what a drafter's host collects in one layer is bounded by what requests may
        accept at all."""
        host = world.hosts[world.home[address]]
        waiting, most = len(host.executor._local), 4 * self.spec.max_num_seqs
        if self.spec.placement == "alone":  # the messages of one event to all roles, and the runs that it launches
            most += self.spec.stages + self.spec.policy.most_runs(self.spec.stages)
            most += 3 * self.spec.drafters * self.spec.max_num_seqs
        if waiting > most:
            raise InvariantBroken(
                f"L8: {waiting} events wait in the rank of {address_name(address)}, the bound is {most}"
            )
        if not host.inbox:
            return
        runs = sum(isinstance(event.message.body, Run) for event in host.inbox)
        others = sum(not event.message.is_control for event in host.inbox) - runs
        window = self.spec.policy.most_runs(self.spec.stages)
        most = 2 * window + self.spec.stages + len(self.spec.requests) * (self.spec.context + 2)
        if runs > window or others > most:
            raise InvariantBroken(
                f"L8: {runs} runs and {others} other messages wait at the rank of {address_name(address)}"
            )


Limit = tuple[str, int, int]


def _bounds(machine: Machine, spec: WorldSpec) -> Iterator[Limit]:
    if isinstance(machine, Orchestrator):
        return _orchestrator_bounds(machine, spec)
    return _stage_bounds(machine, spec) if isinstance(machine, Stage) else _drafter_bounds(machine, spec)


def _tree_bounds(tree: Tree) -> Iterator[Limit]:
    yield "tree", tree.size, tree.max_nodes
    # A living node is pushed once; entries of the dead are swept when an advance finds too many.
    yield "unsent nodes", len(tree._unsent), SLACK + 2 * tree.max_nodes + 1


def _allocator_bounds(allocator: SlotAllocator) -> Iterator[Limit]:
    yield "leased slots", len(allocator._leased), allocator.speculative
    yield "slot operations", len(allocator._ops) + len(allocator._released), min(MAX_OPS, allocator.capacity + 2)


def _orchestrator_bounds(machine: Orchestrator, spec: WorldSpec) -> Iterator[Limit]:
    yield "runs in flight", len(machine._flight), spec.policy.most_runs(spec.stages)
    # A new root goes without a credit, so some may be owed: at most one for each run that may be out.
    yield "credits owed", RUNS_AHEAD - machine._credits, RUNS_AHEAD + spec.policy.most_runs(spec.stages)
    yield "waiting requests", len(machine._waiting), len(spec.requests)
    yield from _allocator_bounds(machine._allocator)
    yield "sessions", len(machine._sessions) + len(machine._draining), spec.max_num_seqs
    most = 0
    for session in machine._sessions.values():
        yield from _tree_bounds(session.tree)
        yield "tokens emitted", session.emitted, session.request.max_new_tokens
        # Swept with the nodes that come; between two such messages an accepted token may get a second name.
        most += SLACK + 2 * session.tree.max_nodes + spec.policy.draft_batch * spec.policy.topk
        most += session.request.max_new_tokens
    for names in machine._sources.names:
        yield "names", names, most
    yield "deferred results", len(machine._deferred), spec.policy.most_runs(spec.stages)


def _stage_bounds(stage: Stage, spec: WorldSpec) -> Iterator[Limit]:
    # At the first one RUNS_AHEAD wait for a credit, and behind them the new roots that came since.
    yield "queue", len(stage._queue), min(RUNS_AHEAD + 2, stage._window) if stage._is_first else stage._window
    yield "cancelled runs", len(stage._cancelled), stage._window
    # Some end, others are decoded, and their settings may be here before the run that frees the first.
    kept = sum(make_job_spec(spec).slots) // LEAST_SHARED if spec.keeps_prefixes else 0
    yield "sequences", len(stage._sampling), 1 + 2 * spec.max_num_seqs + kept


def _drafter_bounds(drafter: Machine, spec: WorldSpec) -> Iterator[Limit]:
    assert isinstance(drafter, Drafter)
    yield from _allocator_bounds(drafter._allocator)
    guesses = sum(len(sequence.ahead) for sequence in drafter._sequences.values())
    yield "leased slots that no guess has", len(drafter._allocator._leased) - guesses, 0
    yield "sequences", len(drafter._sequences), spec.max_num_seqs
    yield "batch", len(drafter._pass.nodes) if drafter._pass else 0, spec.policy.draft_batch * spec.max_num_seqs
    for sequence in drafter._sequences.values():
        yield "nodes ahead", len(sequence.ahead), spec.policy.max_ahead
        yield "withheld", len(sequence.withheld), spec.policy.most_nodes()
        yield "prompt", len(sequence.prompt), spec.context
        if sequence.tree is not None:
            yield from _tree_bounds(sequence.tree)
