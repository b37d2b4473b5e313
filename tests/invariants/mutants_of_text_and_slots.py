"""Faults that break what is said and where it is kept: invariants L1 to L5."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvbuffers.slot_allocator import SlotAllocator
from kvbuffers.slot_table import SLOT, SlotTable
from pipeinfer.core.edges import Edges
from pipeinfer.core.messages import Credit, Result, Run, SlotOpKind
from pipeinfer.core.ports import Idle, Send
from pipeinfer.orchestrator.launcher import Launcher
from pipeinfer.orchestrator.machine import Orchestrator
from pipeinfer.orchestrator.session import Waiting
from pipeinfer.sim.network import Network
from speculation.schedules.continuous import choose_rows
from speculation.trees.accept import accept
from speculation.trees.tree import Tree
from stages.models.emulated import EmulatedShard
from stages.stage.machine import Stage
from tests.invariants.hunt import Mutant, roll, wrap

TEXT_AND_CELLS: list[Mutant] = []
mutant = roll(TEXT_AND_CELLS)


# L1: the text.


@mutant("L1")
def accept_a_token_the_target_did_not_choose(patch: pytest.MonkeyPatch) -> None:
    def advance(original: Any, tree: Tree, token: int) -> Any:
        return original(tree, next(iter(tree.root.children), token) if tree.root.choice is not None else token)

    wrap(patch, Tree, "advance", advance)


@mutant("L1")
def stop_tokens_are_ignored(patch: pytest.MonkeyPatch) -> None:
    never = lambda tree, most, stops, judge: accept(tree, most, frozenset(), judge)  # noqa: E731
    patch.setattr("pipeinfer.orchestrator.machine.accept", never)


@mutant("L1")
def one_token_too_many(patch: pytest.MonkeyPatch) -> None:
    def take(original: Any, waiting: Waiting) -> Any:
        session = original(waiting)
        request = session.request
        if len(request.prompt) + request.max_new_tokens < waiting._context:
            session.request = replace(request, max_new_tokens=request.max_new_tokens + 1)
        return session

    wrap(patch, Waiting, "take", take)


@mutant("L1")
def a_faulty_row_is_taken_for_a_good_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("stages.stage.machine._marked", lambda message, event: message.rows)


@mutant("L1", "plain")
def what_is_faulty_in_a_prompt_is_no_matter(patch: pytest.MonkeyPatch) -> None:
    def result(original: Any, machine: Orchestrator, message: Any) -> Any:
        run = next(iter(machine._flight))
        roots = {node.slot for node in run.nodes}
        rows = tuple(row for row in message.rows if row.token >= 0 or row.slot in roots)
        return original(machine, message._replace(rows=rows) if run.is_prefill else message)

    wrap(patch, Orchestrator, "_result", result)


@mutant("L2")
def the_newest_request_goes_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Waiting, "next", property(lambda waiting: waiting._sessions[-1] if waiting._sessions else None))
    patch.setattr(Waiting, "take", lambda waiting: waiting._sessions.pop())


@mutant("L1")
def withdrawing_ends_whatever_is_served(patch: pytest.MonkeyPatch) -> None:
    def abort(original: Any, machine: Orchestrator, number: int) -> Any:
        session = next(iter(machine._sessions.values()), None)
        return original(machine, session.caller_number if session else number)

    wrap(patch, Orchestrator, "_abort", abort)


@mutant("StallError")
def the_next_request_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    def begin(original: Any, machine: Orchestrator) -> Any:
        return original(machine) if len(machine._waiting) < 2 else None

    wrap(patch, Orchestrator, "_begin", begin)


def more_in_last_row(batch: Any, slots: list[int]) -> Any:
    ends = batch.ancestor_ends.copy()
    ends[-1] += len(slots)
    return replace(batch, ancestors=np.append(batch.ancestors, slots).astype(np.int64), ancestor_ends=ends)


@mutant("L1")
def a_row_sees_a_dead_sibling(patch: pytest.MonkeyPatch) -> None:
    def allocate(original: Any, table: SlotTable, rows: Any, canonical: bool = False) -> Any:
        batch = original(table, rows, canonical)
        if not canonical:
            state = table._sequences[rows[-1].sequence]
            prefix, path = state.above(rows[-1])
            alike = [slot for slot, (_, *seen) in state.leased.items() if seen == [prefix, path + SLOT.pack(slot)]]
            return more_in_last_row(batch, [slot for slot in alike if slot != rows[-1].slot])
        return batch

    wrap(patch, SlotTable, "allocate", allocate)


@mutant("L1")
def positions_are_off_by_one_in_trees(patch: pytest.MonkeyPatch) -> None:
    def allocate(original: Any, table: SlotTable, rows: Any, canonical: bool = False) -> Any:
        batch = original(table, rows, canonical)
        return batch if canonical else replace(batch, positions=batch.positions + 1)

    wrap(patch, SlotTable, "allocate", allocate)


@mutant("L1")
def the_last_layer_is_skipped_for_wide_runs(patch: pytest.MonkeyPatch) -> None:
    def forward(original: Any, shard: EmulatedShard, batch: Any, hidden: Any) -> Any:
        words = yield from original(shard, batch, hidden)
        return words if len(batch.tokens) < 3 else np.roll(words, 1)

    wrap(patch, EmulatedShard, "forward", forward)


@mutant("L1", "pipeinfer")
def a_row_sees_canonical_slots_beyond_its_joint(patch: pytest.MonkeyPatch) -> None:
    def allocate(original: Any, table: SlotTable, rows: Any, canonical: bool = False) -> Any:
        batch = original(table, rows, canonical)
        length = table.length(rows[0].sequence)
        return batch if canonical else replace(batch, prefix=np.full_like(batch.prefix, length))

    wrap(patch, SlotTable, "allocate", allocate)


# L2: every run ends once, and nothing is verified twice.


@mutant("L2", "continuous")
def a_node_is_sent_twice(patch: pytest.MonkeyPatch) -> None:
    def sample(tree: Tree, *rest: Any) -> Any:
        nodes = choose_rows(tree, *rest)
        for node in nodes[-1:]:
            if node is not tree.root and node.position % 5 == 4:
                node.pending = True
                tree._push(node)
        return nodes

    patch.setattr("speculation.schedules.continuous.choose_rows", sample)


@mutant("L2")
def idle_before_the_last_run_is_back(patch: pytest.MonkeyPatch) -> None:
    def settle(original: Any, machine: Orchestrator, session: Any) -> Any:
        if session.is_preempted or session.runs != 1:
            return original(machine, session)
        machine._draining.remove(session)
        return [Idle(session.stats, session.caller_number)]

    wrap(patch, Orchestrator, "_settle", settle)


@mutant("StallError")
def a_result_is_dropped(patch: pytest.MonkeyPatch) -> None:
    def arrivals(original: Any, net: Network, source: int, dest: int, message: Any, *rest: Any) -> Any:
        when = original(net, source, dest, message, *rest)
        return [] if isinstance(message.body, Result) and message.body.run % 11 == 10 else when

    wrap(patch, Network, "arrivals", arrivals)


@mutant("L4")
def a_result_is_sent_twice(patch: pytest.MonkeyPatch) -> None:
    def computed(original: Any, stage: Stage, event: Any) -> Any:
        commands = original(stage, event)
        first = commands[0].message
        if isinstance(first.body, Result) and first.body.run % 5 == 4:
            commands.insert(1, Send(stage._edges.message(0, first.body)))
        return commands

    wrap(patch, Stage, "_computed", computed)
    blind_to_order(patch)


# L3: slots.


@mutant("L3")
def one_commit_is_skipped(patch: pytest.MonkeyPatch) -> None:
    def operations(original: Any, allocator: SlotAllocator) -> Any:
        ops = original(allocator)
        return tuple(op for op in ops if op.kind is not SlotOpKind.COMMIT or op.position % 5 != 4)

    wrap(patch, SlotAllocator, "operations", operations)


@mutant("L3")
def the_wrong_slot_is_committed(patch: pytest.MonkeyPatch) -> None:
    def operations(original: Any, allocator: SlotAllocator) -> Any:
        ops = original(allocator)
        return tuple(
            op._replace(slot=min(allocator._leased))
            if op.kind is SlotOpKind.COMMIT and op.position % 3 == 2 and allocator._leased
            else op
            for op in ops
        )

    wrap(patch, SlotAllocator, "operations", operations)


@mutant("L3")
def a_living_slot_is_released(patch: pytest.MonkeyPatch) -> None:
    def result(original: Any, machine: Orchestrator, message: Any) -> Any:
        commands = original(machine, message)
        living = [node for run in machine._flight for node in run.nodes if node.alive and node.slot is not None]
        if message.run % 5 == 3 and living and living[-1].slot in machine._allocator._leased:
            machine._allocator.release(living[-1].sequence, living[-1].slot)
        return commands

    wrap(patch, Orchestrator, "_result", result)


@mutant("L3")
def a_slot_is_leased_before_it_is_released(patch: pytest.MonkeyPatch) -> None:
    def operations(original: Any, allocator: SlotAllocator) -> Any:
        return tuple(op for op in original(allocator) if op.kind is not SlotOpKind.RELEASE)

    wrap(patch, SlotAllocator, "operations", operations)


@mutant("L3")
def a_dead_slot_is_never_given_back(patch: pytest.MonkeyPatch) -> None:
    def release(original: Any, allocator: SlotAllocator, sequence: int, *slots: int) -> None:
        for slot in slots:
            allocator._own(sequence, slot)

    wrap(patch, SlotAllocator, "release", release)


@mutant("L3")
def a_table_forgets_to_release(patch: pytest.MonkeyPatch) -> None:
    def release(original: Any, table: SlotTable, ops: Any) -> None:
        original(table, [op for op in ops if op.kind is not SlotOpKind.RELEASE])

    def allocate(original: Any, table: SlotTable, rows: Any, canonical: bool = False) -> Any:
        for row in rows:
            if table._state(row.sequence).leased.pop(row.slot, None):
                table._used.discard(row.slot)
        return original(table, rows, canonical)

    wrap(patch, SlotTable, "apply", release)
    wrap(patch, SlotTable, "allocate", allocate)


@mutant("L3")
def a_living_sequence_is_freed(patch: pytest.MonkeyPatch) -> None:
    def accept_some(original: Any, machine: Orchestrator, session: Any, *rest: Any) -> Any:
        commands = original(machine, session, *rest)
        if session.emitted % 7 == 6:
            machine._allocator.free(session.sequence)
        return commands

    wrap(patch, Orchestrator, "_accept", accept_some)


@mutant("L3", "rounds")
def a_row_attends_to_another_sequence(patch: pytest.MonkeyPatch) -> None:
    """The canonical slots of the first sequence in the table, whichever the row is of."""

    def allocate(original: Any, table: SlotTable, rows: Any, canonical: bool = False) -> Any:
        batch = original(table, rows, canonical)
        first = next(iter(table._sequences.values()))
        prefix = np.minimum(batch.prefix, len(first.canonical))
        return replace(batch, canonical=(first.canonical_ranges(),) * len(batch.canonical), prefix=prefix)

    wrap(patch, SlotTable, "allocate", allocate)


@mutant("L2", "plain")
def a_result_is_taken_for_one_of_the_request_being_served(patch: pytest.MonkeyPatch) -> None:
    def result(original: Any, machine: Orchestrator, message: Any) -> Any:
        run, living = next(iter(machine._flight)), list(machine._sessions.values())
        if living and run.sessions[0].is_over:
            run.sessions[0] = living[0]
        return original(machine, message)

    wrap(patch, Orchestrator, "_result", result)


@mutant("L3")
def a_sequence_is_never_freed(patch: pytest.MonkeyPatch) -> None:
    def operations(original: Any, allocator: SlotAllocator) -> Any:
        return tuple(op for op in original(allocator) if op.kind is not SlotOpKind.FREE)

    wrap(patch, SlotAllocator, "operations", operations)


@mutant("L6")
def a_tombstone_loses_its_operations(patch: pytest.MonkeyPatch) -> None:
    def send(original: Any, stage: Stage, dest: int, body: Any, *rest: Any) -> Any:
        is_tombstone = isinstance(body, Run) and body.is_tombstone
        return original(stage, dest, body._replace(ops=()) if is_tombstone else body, *rest)

    wrap(patch, Stage, "_send", send)


@mutant("RemoteProtocolError", "pipeinfer")
def the_slot_of_a_copy_is_committed(patch: pytest.MonkeyPatch) -> None:
    def nodes(original: Any, launcher: Launcher, step: Any, *rest: Any) -> Any:
        run, allocator = original(launcher, step, *rest), launcher._allocator
        for node in [node for node in step.copies if node.slot in allocator._leased]:
            slot = next(row.slot for row in run.rows if row.position == node.position)
            allocator._leased[slot] = allocator._released.pop(slot)
            allocator.release(node.sequence, node.slot)
            node.slot = slot
        return run

    wrap(patch, Launcher, "nodes", nodes)


@mutant("L3", "continuous")
def what_is_thrown_away_keeps_its_slots(patch: pytest.MonkeyPatch) -> None:
    def accept_some(original: Any, machine: Orchestrator, session: Any, *rest: Any) -> Any:
        session.tree.prune = lambda: Tree.prune(session.tree)[:0]
        return original(machine, session, *rest)

    wrap(patch, Orchestrator, "_accept", accept_some)


# L4: order.


def blind_to_order(patch: pytest.MonkeyPatch) -> None:
    """The machines' own check of transactions is off."""
    patch.setattr(Edges, "check", lambda edges, message: None)


@mutant("L4")
def a_transaction_number_is_repeated(patch: pytest.MonkeyPatch) -> None:
    def message(original: Any, edges: Edges, dest: int, body: Any) -> Any:
        made = original(edges, dest, body)
        return made._replace(txn=min(made.txn, 6))

    wrap(patch, Edges, "message", message)
    blind_to_order(patch)


@mutant("L4")
def the_stream_overtakes_itself(patch: pytest.MonkeyPatch) -> None:
    def arrivals(original: Any, net: Network, source: int, dest: int, message: Any, *rest: Any) -> Any:
        when = original(net, source, dest, message, *rest)
        return [at + 1.5 if message.txn % 4 == 3 and not message.is_control else at for at in when]

    wrap(patch, Network, "arrivals", arrivals)
    blind_to_order(patch)


# L5: liveness.


@mutant("StallError")
def a_credit_is_lost(patch: pytest.MonkeyPatch) -> None:
    def arrivals(original: Any, net: Network, source: int, dest: int, message: Any, *rest: Any) -> Any:
        when = original(net, source, dest, message, *rest)
        return [] if isinstance(message.body, Credit) and message.body.run == 9 else when

    wrap(patch, Network, "arrivals", arrivals)


@mutant("L5")
def a_result_waits_for_long(patch: pytest.MonkeyPatch) -> None:
    def arrivals(original: Any, net: Network, source: int, dest: int, message: Any, *rest: Any) -> Any:
        when = original(net, source, dest, message, *rest)
        return [at + 1000.0 if isinstance(message.body, Result) and message.body.run == 7 else at for at in when]

    wrap(patch, Network, "arrivals", arrivals)
