"""Faults of advice, wire, bounds, determinism and acceptance: invariants L6 to L10."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import pipeinfer.orchestrator.machine
import pipeinfer.runtime.executor
import pipeinfer.sim.world
import stages.stage.machine
from kvbuffers.slot_table import SlotTable
from pipeinfer.core.messages import NO_SLOT, Cancelled, Credit, Message, Run
from pipeinfer.core.ports import Idle
from pipeinfer.core.wire import decode
from pipeinfer.orchestrator.flight import Flight
from pipeinfer.orchestrator.machine import Orchestrator
from pipeinfer.orchestrator.sources import Sources
from pipeinfer.runtime.executor import Executor
from pipeinfer.sim.network import Network
from speculation.drafter.machine import Drafter
from speculation.schedules.continuous import choose_rows
from speculation.trees.tree import Tree
from stages.stage.machine import Stage
from tests.invariants.hunt import Mutant, roll, wrap

ADVICE_AND_BOUNDS: list[Mutant] = []
mutant = roll(ADVICE_AND_BOUNDS)


# L6: advice.


@mutant("L6")
def a_living_run_is_cancelled(patch: pytest.MonkeyPatch) -> None:
    def losses(original: Any, flight: Flight, *rest: Any) -> Any:
        runs, rows = original(flight, *rest)
        return runs + [run for run in list(flight)[:1] if runs and run not in runs], rows

    wrap(patch, Flight, "losses", losses)


@mutant("L6")
def a_cancel_kills_what_came_before(patch: pytest.MonkeyPatch) -> None:
    def cancel(original: Any, stage: Stage, message: Any) -> Any:
        before = tuple(dead._replace(run=dead.run - 1, slot=NO_SLOT) for dead in message.rows)
        return original(stage, message._replace(rows=message.rows + before))

    wrap(patch, Stage, "_cancel", cancel)


@mutant("L6")
def a_stage_entombs_a_living_run(patch: pytest.MonkeyPatch) -> None:
    def living(original: Any, table: SlotTable, rows: Any, dead: Any) -> Any:
        return () if rows and rows[0].position % 7 == 6 else original(table, rows, dead)

    wrap(patch, SlotTable, "living", living)


@mutant("L6")
def a_stage_drops_a_living_row(patch: pytest.MonkeyPatch) -> None:
    def living(original: Any, table: SlotTable, rows: Any, dead: Any) -> Any:
        alive = original(table, rows, dead)
        return alive[:-1] if len(alive) > 2 and rows[0].parent != NO_SLOT else alive

    wrap(patch, SlotTable, "living", living)


@mutant("L6")
def the_cancel_of_a_row_names_a_living_one(patch: pytest.MonkeyPatch) -> None:
    def losses(original: Any, flight: Flight, died: Any, roots: Any) -> Any:
        runs, rows = original(flight, died, roots)
        if rows:
            nodes = [node for run in flight for node in run.nodes if node.alive and node.sequence in roots]
            living = [node for node in nodes if node is not roots[node.sequence]]
            rows += [Cancelled(node.run or 0, node.slot or 0, node.sequence) for node in living[-1:]]
        return runs, rows

    wrap(patch, Flight, "losses", losses)


@mutant("L6")
def the_cancel_of_a_row_kills_its_run(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Stage, "_mark", lambda original, stage, run, slot: original(stage, run, NO_SLOT))


@mutant("L6")
def a_cancelled_row_takes_its_slot_along(patch: pytest.MonkeyPatch) -> None:
    """Whatever is later put into that slot is skipped too."""
    slots: dict[int, set[int]] = {}

    def mark(original: Any, stage: Stage, run: int, slot: int) -> Any:
        slots.setdefault(id(stage._table), set()).add(slot)
        return original(stage, run, slot)

    def living(original: Any, table: SlotTable, rows: Any, dead: Any) -> Any:
        return original(table, rows, set(dead) | slots.get(id(table), set()))

    wrap(patch, Stage, "_mark", mark)
    wrap(patch, SlotTable, "living", living)


@mutant("RemoteProtocolError", "rounds")
def the_end_cancels_the_roots_own_run(patch: pytest.MonkeyPatch) -> None:
    def doomed(original: Any, flight: Flight, session: Any) -> Any:
        runs, rows = original(flight, session)
        over = [run for run in flight if all(one.is_over for one in run.sessions)]
        return runs + [run for run in over if run not in runs and run.cancelled_at is None], rows

    wrap(patch, Flight, "doomed", doomed)


# L7: the wire.


@mutant("L7")
def the_decoder_drops_a_flag(patch: pytest.MonkeyPatch) -> None:
    def wrong(data: bytes) -> Message:
        message = decode(data)
        body = message.body
        return message._replace(body=body._replace(is_tombstone=False)) if isinstance(body, Run) else message

    for module in (pipeinfer.sim.world, pipeinfer.sim.replay):
        patch.setattr(module, "decode", wrong)


@mutant("L7")
def the_wire_names_a_wrong_parent(patch: pytest.MonkeyPatch) -> None:
    def wrong(data: bytes) -> Message:
        message = decode(data)
        body = message.body
        if isinstance(body, Run) and len(body.rows) > 1 and not body.is_canonical:
            first, *others = body.rows
            rows = (first, *(row._replace(parent=first.parent) for row in others))
            return message._replace(body=body._replace(rows=rows))
        return message

    patch.setattr(pipeinfer.sim.world, "decode", wrong)


@mutant("L7")
def activations_are_overwritten_on_their_way(patch: pytest.MonkeyPatch) -> None:
    def arrivals(original: Any, net: Network, source: int, dest: int, message: Any, payload: Any, now: float) -> Any:
        if payload is not None and message.body.run % 3 == 2:
            payload += np.uint64(1)
        return original(net, source, dest, message, payload, now)

    wrap(patch, Network, "arrivals", arrivals)


@mutant("LocalProtocolError")
def activations_of_dropped_rows_stay(patch: pytest.MonkeyPatch) -> None:
    def step(original: Any, executor: Executor, now: float) -> Any:
        for address, job in list(executor._jobs.items()):
            if job.compute.keep is not None:
                executor._jobs[address] = pipeinfer.runtime.executor._Job(
                    address, replace(job.compute, keep=None), job.passes
                )
        return original(executor, now)

    wrap(patch, Executor, "step", step)


@mutant("L1")
def the_first_rows_stay_whichever_died(patch: pytest.MonkeyPatch) -> None:
    def compute(original: Any, stage: Stage, message: Any, alive: tuple[int, ...], payload: Any) -> Any:
        command = original(stage, message, alive, payload)
        return command if command.keep is None else replace(command, keep=tuple(range(len(alive))))

    wrap(patch, Stage, "_compute", compute)


@mutant("L6")
def the_result_names_a_wrong_row(patch: pytest.MonkeyPatch) -> None:
    def result(original: Any, message: Any, event: Any) -> Any:
        found = original(message, event)
        return found._replace(rows=tuple(row._replace(slot=found.rows[0].slot) for row in found.rows))

    wrap(patch, stages.stage.machine, "_result", result)


# L8: bounds.


@mutant("L8")
def credits_are_invented(patch: pytest.MonkeyPatch) -> None:
    def receive(original: Any, machine: Orchestrator, message: Any) -> Any:
        machine._credits += isinstance(message.body, Credit) and message.body.run % 4 == 3
        return original(machine, message)

    wrap(patch, Orchestrator, "_receive", receive)


@mutant("L8")
def the_drafter_ignores_its_lead(patch: pytest.MonkeyPatch) -> None:
    def leaves(original: Any, drafter: Drafter, sequence: Any) -> Any:
        policy, drafter._policy = drafter._policy, replace(drafter._policy, max_ahead=drafter._policy.max_ahead + 2)
        nodes = original(drafter, sequence)
        drafter._policy = policy
        return nodes

    wrap(patch, Drafter, "_leaves", leaves)


@mutant("L8")
def names_are_never_forgotten(patch: pytest.MonkeyPatch) -> None:
    class Hoard(dict[int, Any]):
        def __len__(self) -> int:
            asked_by_grow = sys._getframe(1).f_code.co_name == "grow"
            return 0 if asked_by_grow else super().__len__()

    def begin(original: Any, sources: Sources, session: Any) -> Any:
        told = original(sources, session)
        names = sources._served[session.sequence].names
        names.update({drafter: Hoard(known) for drafter, known in names.items()})
        return told

    wrap(patch, Sources, "open", begin)


@mutant("L8")
def dead_nodes_still_count(patch: pytest.MonkeyPatch) -> None:
    def advance(original: Any, tree: Tree, token: int) -> Any:
        heir, dead = original(tree, token)
        tree.size += len(dead)
        return heir, dead

    wrap(patch, Tree, "advance", advance)


@mutant("L8")
def old_cancels_are_remembered(patch: pytest.MonkeyPatch) -> None:
    def done(original: Any, stage: Stage, message: Any) -> None:
        stage._newest_done = message.run

    wrap(patch, Stage, "_done", done)


@mutant("L8")
def the_window_is_ignored(patch: pytest.MonkeyPatch) -> None:
    def step(original: Any, machine: Orchestrator) -> Any:
        machine._window += 1
        commands = original(machine)
        machine._window -= 1
        return commands

    wrap(patch, Orchestrator, "_step", step)


# L9: determinism.


@mutant("L9")
def the_orchestrator_looks_at_the_clock(patch: pytest.MonkeyPatch) -> None:
    def sample(tree: Tree, policy: Any, room: int, *rest: Any) -> Any:
        return choose_rows(tree, policy, room if time.perf_counter_ns() // 100 % 2 else min(room, 1), *rest)

    patch.setattr("speculation.schedules.continuous.choose_rows", sample)


@mutant("L9")
def machines_share_a_counter(patch: pytest.MonkeyPatch) -> None:
    jobs = iter(range(1, 10**9))

    def compute(original: Any, drafter: Drafter, *rest: Any, **options: Any) -> Any:
        drafter._job = next(jobs)
        return original(drafter, *rest, **options)

    wrap(patch, Drafter, "_compute", compute)


# L10: acceptance as it was ordered.


@mutant("L10", "pipeinfer")
def the_draft_is_led_astray(patch: pytest.MonkeyPatch) -> None:
    def evaluate(original: Any, drafter: Drafter, *rest: Any) -> Any:
        command = original(drafter, *rest)
        return replace(command, batch=replace(command.batch, positions=command.batch.positions + 1))

    wrap(patch, Drafter, "_evaluate", evaluate)


@mutant("L10", "plain")
def luck_is_counted_as_acceptance(patch: pytest.MonkeyPatch) -> None:
    def settle(original: Any, machine: Orchestrator, session: Any) -> Any:
        commands = original(machine, session)
        for command in commands:
            if not isinstance(command, Idle):
                continue
            command.stats.accepted, command.stats.corrections = command.stats.corrections, command.stats.accepted
        return commands

    wrap(patch, Orchestrator, "_settle", settle)
