"""Faults of many requests at once: slots that are shared or lost, turns, preemption, and who gets what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import pipeinfer.orchestrator.pool
from kvbuffers.slot_allocator import SlotAllocator
from kvbuffers.slot_table import SlotTable
from pipeinfer.core.messages import Cancelled, Nodes, SlotOpKind
from pipeinfer.core.ports import Emit
from pipeinfer.orchestrator.flight import Flight
from pipeinfer.orchestrator.launcher import Launcher
from pipeinfer.orchestrator.machine import Orchestrator
from pipeinfer.orchestrator.pool import Pool
from pipeinfer.orchestrator.session import Session
from speculation.drafter.machine import Drafter
from speculation.schedules.continuous import Continuous
from speculation.schedules.rounds import Rounds
from stages.models.emulated import EmulatedShard
from tests.invariants.hunt import Mutant, roll, wrap
from tests.invariants.mutants_of_text_and_slots import more_in_last_row

OF_MANY: list[Mutant] = []
mutant = roll(OF_MANY, many=True)


# Who sees what.


@mutant("L3")
def a_row_sees_a_slot_of_another_sequence(patch: pytest.MonkeyPatch) -> None:
    def allocate(original: Any, table: SlotTable, rows: Any, canonical: bool = False) -> Any:
        batch = original(table, rows, canonical)
        others = [state for one, state in table._sequences.items() if one != rows[-1].sequence and state.canonical]
        return more_in_last_row(batch, [next(iter(others[0].canonical))]) if others else batch

    wrap(patch, SlotTable, "allocate", allocate)


@mutant("L1")
def the_mask_shows_what_another_sequence_sees(patch: pytest.MonkeyPatch) -> None:
    def enter(original: Any, shard: EmulatedShard, batch: Any, hidden: Any) -> Any:
        words, places, sees, pace = original(shard, batch, hidden)
        if len(batch.canonical) > 1:
            sees[-1] |= sees[0]
        return words, places, sees, pace

    wrap(patch, EmulatedShard, "_enter", enter)


@mutant("L1")
def a_row_is_drawn_by_the_settings_of_another_sequence(patch: pytest.MonkeyPatch) -> None:
    def draw(original: Any, table: SlotTable, samplings: Any, *rest: Any, **options: Any) -> Any:
        return original(table, [samplings[0]] * len(samplings), *rest, **options)

    wrap(patch, SlotTable, "draw", draw)


# Slots that are shared.


@mutant("L3")
def a_fork_has_one_token_too_many(patch: pytest.MonkeyPatch) -> None:
    def common(original: Any, one: Any, other: Any, least: int, most: int) -> int:
        return min(original(one, other, least, most) + 1, most)

    wrap(patch, pipeinfer.orchestrator.pool, "_common", common)


@mutant("L3")
def a_slot_is_freed_while_it_is_shared(patch: pytest.MonkeyPatch) -> None:
    def give_up(original: Any, allocator: SlotAllocator, sequence: int, length: int) -> Any:
        for slot in allocator._canonical[sequence][length:]:
            allocator._shared.pop(slot, None)
        return original(allocator, sequence, length)

    wrap(patch, SlotAllocator, "_give_up", give_up)


@mutant("L3")
def a_table_frees_a_slot_that_is_shared(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlotTable, "_give_up", lambda table, canonical: table._used.difference_update(canonical))


@mutant("LocalProtocolError")
def what_was_freed_is_still_offered(patch: pytest.MonkeyPatch) -> None:
    def clear(original: Any, pool: Pool, *rest: Any, **options: Any) -> Any:
        kept = dict(pool._kept)
        found = original(pool, *rest, **options)
        pool._kept.update(kept)
        return found

    wrap(patch, Pool, "_clear", clear)


# Slots that are lost, or freed too often.


@mutant("L3")
def an_abort_leaves_its_slots(patch: pytest.MonkeyPatch) -> None:
    def end(original: Any, pool: Pool, session: Any, is_whole: bool) -> None:
        if is_whole:
            original(pool, session, is_whole)

    wrap(patch, Pool, "end", end)


@mutant("L3")
def a_finished_sequence_is_freed_twice(patch: pytest.MonkeyPatch) -> None:
    def operations(original: Any, allocator: SlotAllocator) -> Any:
        ops = original(allocator)
        return ops + tuple(op for op in ops if op.kind is SlotOpKind.FREE)

    wrap(patch, SlotAllocator, "operations", operations)


@mutant("L3")
def the_free_of_a_preempted_request_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    def preempt(original: Any, machine: Orchestrator, session: Any) -> Any:
        commands, allocator = original(machine, session), machine._allocator
        allocator._ops = [op for op in allocator._ops if op.sequence != session.sequence]
        return commands

    wrap(patch, Orchestrator, "_preempt", preempt)


# Turns.


@mutant("L5")
def the_last_request_is_never_served(patch: pytest.MonkeyPatch) -> None:
    for schedule in (Continuous, Rounds):
        wrap(patch, schedule, "next", lambda original, schedule, now: original(
            schedule, replace(now, trees=now.trees[:-1] or now.trees)))  # fmt: skip


@mutant("L5", "plain")
def who_came_first_is_served_first_each_time(patch: pytest.MonkeyPatch) -> None:
    def step(original: Any, schedule: Continuous, now: Any) -> Any:
        schedule._turns.clear()
        return original(schedule, now)

    wrap(patch, Continuous, "next", step)


@mutant("L5")
def the_first_request_is_preempted(patch: pytest.MonkeyPatch) -> None:
    def preempt(original: Any, machine: Orchestrator, session: Any) -> Any:
        return original(machine, min(machine._sessions.values(), key=lambda one: one.rank))

    wrap(patch, Orchestrator, "_preempt", preempt)


@mutant("L2")
def priorities_are_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Session, "rank", property(lambda session: (0, session.arrival)))


@mutant("L2")
def one_request_too_many_is_decoded(patch: pytest.MonkeyPatch) -> None:
    def begin(original: Any, machine: Orchestrator) -> Any:
        machine._most_sessions += 1
        commands = original(machine)
        machine._most_sessions -= 1
        return commands

    wrap(patch, Orchestrator, "_begin", begin)


# Preemption.


@mutant("L1")
def a_preempted_request_forgets_its_last_token(patch: pytest.MonkeyPatch) -> None:
    def begin(original: Any, session: Session, *rest: Any) -> None:
        del session.text[len(session.text) - (session.emitted > 0) :]
        original(session, *rest)

    wrap(patch, Session, "begin", begin)


@mutant("L1")
def a_preempted_request_begins_from_nothing(patch: pytest.MonkeyPatch) -> None:
    def begin(original: Any, session: Session, *rest: Any) -> None:
        session.text = list(session.request.prompt)
        original(session, *rest)

    wrap(patch, Session, "begin", begin)


@mutant("L8")
def a_preempted_request_gets_all_its_tokens_again(patch: pytest.MonkeyPatch) -> None:
    def begin(original: Any, session: Session, *rest: Any) -> None:
        session.emitted = 0
        original(session, *rest)

    wrap(patch, Session, "begin", begin)


# Who gets what.


@mutant("L1")
def the_results_of_two_sequences_are_confused(patch: pytest.MonkeyPatch) -> None:
    def result(original: Any, machine: Orchestrator, message: Any) -> Any:
        rows = message.rows
        if rows and rows[0].sequence != rows[-1].sequence:
            first, last = rows[0]._replace(token=rows[-1].token), rows[-1]._replace(token=rows[0].token)
            message = message._replace(rows=(first, *rows[1:-1], last))
        return original(machine, message)

    wrap(patch, Orchestrator, "_result", result)


@mutant("L2")
def tokens_are_credited_to_another_request(patch: pytest.MonkeyPatch) -> None:
    def accept(original: Any, machine: Orchestrator, session: Any, *rest: Any) -> Any:
        commands = original(machine, session, *rest)
        others = [one.caller_number for one in machine._sessions.values() if one is not session and one.has_result]
        if commands and isinstance(commands[0], Emit) and others and session.emitted % 3 == 2:
            commands[0] = replace(commands[0], number=others[0])
        return commands

    wrap(patch, Orchestrator, "_accept", accept)


@mutant("L6", "continuous")
def the_cancel_of_a_row_names_one_of_another_sequence(patch: pytest.MonkeyPatch) -> None:
    def losses(original: Any, flight: Flight, died: Any, roots: Any) -> Any:
        runs, rows = original(flight, died, roots)
        for dead in rows[:1]:
            run = flight._by_number[dead.run]
            rows += [Cancelled(dead.run, node.slot, dead.sequence) for node in run.nodes if node.sequence in roots][:1]
        return runs, rows

    wrap(patch, Flight, "losses", losses)


@mutant("L6")
def the_end_of_one_request_cancels_a_run_of_others(patch: pytest.MonkeyPatch) -> None:
    def doomed(original: Any, flight: Flight, session: Session) -> Any:
        runs, rows = original(flight, session)
        shared = [run for run in flight if session in run.sessions and run not in runs and run.cancelled_at is None]
        return runs + [run for run in shared if len(run.sessions) > 1][:1], rows

    wrap(patch, Flight, "doomed", doomed)


@mutant("L2")
def the_rows_of_sequences_are_mixed(patch: pytest.MonkeyPatch) -> None:
    def nodes(original: Any, launcher: Launcher, *rest: Any) -> Any:
        run = original(launcher, *rest)
        return run._replace(rows=tuple(sorted(run.rows, key=lambda row: row.position)))

    wrap(patch, Launcher, "nodes", nodes)


@mutant("L10", "continuous")
def a_drafter_takes_its_guesses_for_those_of_another_sequence(patch: pytest.MonkeyPatch) -> None:
    def send(original: Any, drafter: Drafter, body: Any) -> Any:
        if isinstance(body, Nodes) and not body.ends_order:
            others = [one for one, sequence in drafter._sequences.items() if sequence.tree is not None]
            body = body._replace(sequence=others[-1]) if others else body
        return original(drafter, body)

    wrap(patch, Drafter, "_send", send)
