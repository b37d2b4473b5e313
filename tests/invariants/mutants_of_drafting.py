"""Faults of those who guess and of those who say when: drafters, sources and schedules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeinfer.core.ports import Send
from pipeinfer.core.protocol import Flag, Kind
from pipeinfer.orchestrator.machine import Orchestrator
from pipeinfer.orchestrator.sources import Sources
from speculation.drafter.machine import Drafter
from speculation.schedules.pipeinfer import PipeInfer
from speculation.schedules.rounds import Rounds, _Phase
from tests.invariants.hunt import Mutant, roll, wrap

DRAFTING: list[Mutant] = []
mutant = roll(DRAFTING)


# Sources.


@mutant("L10", "continuous")
def one_drafters_nodes_hang_under_anothers_names(patch: pytest.MonkeyPatch) -> None:
    def grow(original: Any, sources: Sources, message: Any) -> Any:
        served = sources._served
        if served is not None:
            served.names[message.source] = served.names[sources._drafters[0]]
        return original(sources, message)

    wrap(patch, Sources, "grow", grow)


@mutant("L8", "rounds")
def lookup_goes_on_beyond_the_end(patch: pytest.MonkeyPatch) -> None:
    def look_up(original: Any, sources: Sources, served: Any) -> None:
        served.last_position += 5
        original(sources, served)
        served.last_position -= 5

    wrap(patch, Sources, "_look_up", look_up)


@mutant("L8")
def a_drafters_nodes_go_on_beyond_the_end(patch: pytest.MonkeyPatch) -> None:
    def grow(original: Any, sources: Sources, message: Any) -> Any:
        if sources._served is not None:
            sources._served.last_position += 1
        found = original(sources, message)
        if sources._served is not None:
            sources._served.last_position -= 1
        return found

    wrap(patch, Sources, "grow", grow)
    wrap(patch, Drafter, "_open", lambda original, drafter, message, rows: original(
        drafter, message._replace(run=message.run + 1), rows))  # fmt: skip


# Orders.


@mutant("L11", "rounds")
def an_order_is_answered_twice(patch: pytest.MonkeyPatch) -> None:
    def report(original: Any, drafter: Drafter, rows: Any, ends_order: bool) -> Any:
        commands = original(drafter, rows, ends_order)
        if commands and commands[-1].message.flags & Flag.LAST:
            commands.append(drafter._send(Kind.NODES, drafter._tree.root.position, (), Flag.LAST))  # type: ignore[union-attr]
        return commands

    wrap(patch, Drafter, "_report", report)


@mutant("StallError", "rounds")
def an_order_is_never_answered(patch: pytest.MonkeyPatch) -> None:
    def report(original: Any, drafter: Drafter, rows: Any, ends_order: bool) -> Any:
        is_late = drafter._tree is not None and drafter._tree.root.position > 9
        return original(drafter, rows, ends_order and not is_late)

    wrap(patch, Drafter, "_report", report)


@mutant("StallError", "pipeinfer")
def the_second_drafter_gets_no_order(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Sources, "order", lambda original, sources, order: original(sources, order)[:1])


@mutant("L11", "pipeinfer")
def the_drafter_works_on_after_its_order(patch: pytest.MonkeyPatch) -> None:
    """Passes that an order did not need are done later, whatever happens then."""

    def report(original: Any, drafter: Drafter, rows: Any, ends_order: bool) -> Any:
        passes = drafter._passes
        commands = original(drafter, rows, ends_order)
        drafter._passes = passes
        return commands

    wrap(patch, Drafter, "_report", report)


@mutant("L11", "pipeinfer")
def the_drafter_does_not_forget(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Drafter, "_restart", lambda drafter: None)


@mutant("L8", "pipeinfer")
def the_drafter_forgets_its_guesses_and_not_their_slots(patch: pytest.MonkeyPatch) -> None:
    def restart(original: Any, drafter: Drafter) -> None:
        release = drafter._allocator.release
        drafter._allocator.release = lambda *slots: None  # type: ignore[method-assign]
        original(drafter)
        drafter._allocator.release = release  # type: ignore[method-assign]

    wrap(patch, Drafter, "_restart", restart)


@mutant("L11", "pipeinfer")
def a_token_below_the_cutoff_is_sent(patch: pytest.MonkeyPatch) -> None:
    def children(original: Any, drafter: Drafter, node: Any, choices: Any) -> Any:
        cutoff, drafter._cutoff = drafter._cutoff, drafter._cutoff / 2
        found = original(drafter, node, choices)
        drafter._cutoff = cutoff
        return found

    wrap(patch, Drafter, "_children", children)


# Rounds.


@mutant("L11", "rounds")
def a_round_begins_before_the_last_one_is_back(patch: pytest.MonkeyPatch) -> None:
    def step(original: Any, schedule: Rounds, now: Any) -> Any:
        if schedule._phase is _Phase.VERIFYING and now.tree.root.run is not None and now.tree.root.position % 5 == 4:
            schedule._phase = _Phase.TURNING
        return original(schedule, now)

    wrap(patch, Rounds, "next", step)


@mutant("L11", "rounds")
def a_round_does_not_wait_for_its_drafts(patch: pytest.MonkeyPatch) -> None:
    def step(original: Any, schedule: Rounds, now: Any) -> Any:
        if schedule._phase is _Phase.DRAFTING:
            schedule._phase = _Phase.READY
        return original(schedule, now)

    wrap(patch, Rounds, "next", step)


# PipeInfer.


@mutant("L11", "pipeinfer")
def results_are_heard_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PipeInfer, "defers_results", lambda schedule, now: False)


@mutant("L11", "pipeinfer")
def results_are_heard_before_what_was_drafted_is_sent(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PipeInfer, "defers_results", lambda schedule, now: schedule._is_drafting or now.credits <= 0)


@mutant("RemoteProtocolError", "pipeinfer")
def a_result_that_has_to_wait_is_dropped(patch: pytest.MonkeyPatch) -> None:
    def receive(original: Any, machine: Orchestrator, message: Any) -> Any:
        commands = original(machine, message)
        if message.kind is Kind.RESULT and message in machine._deferred and message.run % 3 == 2:
            machine._deferred.remove(message)
        return commands

    wrap(patch, Orchestrator, "_receive", receive)


@mutant("L11", "pipeinfer")
def a_token_in_flight_gets_no_canonical_run(patch: pytest.MonkeyPatch) -> None:
    def step(original: Any, schedule: PipeInfer, now: Any) -> Any:
        schedule._owes_canonical &= now.tree.root.pending
        return original(schedule, now)

    wrap(patch, PipeInfer, "next", step)


@mutant("L11", "pipeinfer")
def canonical_runs_are_cancelled_too(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, PipeInfer, "_canonical", lambda original, schedule, now: replace(
        original(schedule, now), is_canonical=False))  # fmt: skip


@mutant("L11", "pipeinfer")
def drafting_goes_on_where_it_was(patch: pytest.MonkeyPatch) -> None:
    def accepted(original: Any, schedule: PipeInfer, tokens: int, now: float) -> Any:
        decided = original(schedule, tokens, now)
        schedule._owes_restart = False
        return decided

    wrap(patch, PipeInfer, "accepted", accepted)


@mutant("L11", "pipeinfer")
def everybody_is_told_at_once_what_to_cancel(patch: pytest.MonkeyPatch) -> None:
    def cancel(original: Any, machine: Orchestrator, *rest: Any) -> Any:
        commands = original(machine, *rest)
        if machine._policy.cancel != "relay" or not commands:
            return commands
        advice = commands[0].message
        return [Send(advice._replace(dest=stage, flags=Flag.NONE)) for stage in machine._stages]

    wrap(patch, Orchestrator, "_cancel", cancel)


@mutant("L8")
def a_draft_goes_on_beyond_its_positions(patch: pytest.MonkeyPatch) -> None:
    def open_(original: Any, drafter: Drafter, message: Any, rows: Any) -> Any:
        drafter._positions = 1 << 30
        return original(drafter, message, rows)

    wrap(patch, Drafter, "_open", open_)
