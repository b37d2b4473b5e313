"""Faults of those who guess and of those who say when: drafters, sources and schedules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeinfer.core.messages import Nodes, Result
from pipeinfer.core.ports import Send
from pipeinfer.orchestrator.advice import Advice
from pipeinfer.orchestrator.machine import Orchestrator
from pipeinfer.orchestrator.session import Session
from pipeinfer.orchestrator.sources import Sources
from speculation.drafter.machine import Drafter
from speculation.drafter.sequence import DraftSequence
from speculation.schedules.pipeinfer import PipeInfer
from speculation.schedules.rounds import Rounds, _Phase
from tests.invariants.hunt import Mutant, roll, wrap

DRAFTING: list[Mutant] = []
mutant = roll(DRAFTING)


# Sources.


def _longer(session: Session, more: int) -> None:
    """So many more tokens may be emitted."""
    session.request = replace(session.request, max_new_tokens=session.request.max_new_tokens + more)


@mutant("L10", "continuous")
def one_drafters_nodes_hang_under_anothers_names(patch: pytest.MonkeyPatch) -> None:
    def grow(original: Any, sources: Sources, source: int, message: Any) -> Any:
        served = sources._served.get(message.sequence)
        if served is not None:
            served.names[source] = served.names[sources._drafters[0]]
        return original(sources, source, message)

    wrap(patch, Sources, "grow", grow)


@mutant("L8", "rounds")
def lookup_goes_on_beyond_the_end(patch: pytest.MonkeyPatch) -> None:
    def look_up(original: Any, sources: Sources, served: Any) -> None:
        _longer(served.session, 5)
        original(sources, served)
        _longer(served.session, -5)

    wrap(patch, Sources, "_look_up", look_up)


@mutant("L8")
def a_drafters_nodes_go_on_beyond_the_end(patch: pytest.MonkeyPatch) -> None:
    def grow(original: Any, sources: Sources, source: int, message: Any) -> Any:
        served = sources._served.get(message.sequence)
        if served is None:
            return original(sources, source, message)
        _longer(served.session, 1)
        found = original(sources, source, message)
        _longer(served.session, -1)
        return found

    wrap(patch, Sources, "grow", grow)
    wrap(patch, DraftSequence, "take_prompt", lambda original, sequence, message, *rest: original(
        sequence, message._replace(last_position=message.last_position + 1), *rest))  # fmt: skip


# Orders.


@mutant("L11", "rounds")
def an_order_is_answered_twice(patch: pytest.MonkeyPatch) -> None:
    def report(original: Any, drafter: Drafter, sequence: Any, nodes: Any, ends_order: bool) -> Any:
        commands = original(drafter, sequence, nodes, ends_order)
        if commands and commands[-1].message.body.ends_order:
            commands.append(drafter._send(Nodes(sequence.id, sequence.tree.root.position, True)))
        return commands

    wrap(patch, Drafter, "_report", report)


@mutant("StallError", "rounds")
def an_order_is_never_answered(patch: pytest.MonkeyPatch) -> None:
    def report(original: Any, drafter: Drafter, sequence: Any, nodes: Any, ends_order: bool) -> Any:
        is_late = sequence.tree is not None and sequence.tree.root.position > 9
        return original(drafter, sequence, nodes, ends_order and not is_late)

    wrap(patch, Drafter, "_report", report)


@mutant("StallError", "pipeinfer")
def the_second_drafter_gets_no_order(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Sources, "order", lambda original, sources, order: original(sources, order)[:1])


@mutant("L11", "pipeinfer")
def the_drafter_works_on_after_its_order(patch: pytest.MonkeyPatch) -> None:
    """Passes that an order did not need are done later, whatever happens then."""

    def report(original: Any, drafter: Drafter, sequence: Any, nodes: Any, ends_order: bool) -> Any:
        passes = sequence.passes
        commands = original(drafter, sequence, nodes, ends_order)
        sequence.passes = passes
        return commands

    wrap(patch, Drafter, "_report", report)


@mutant("L11", "pipeinfer")
def the_drafter_does_not_forget(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Drafter, "_restart", lambda drafter, sequence: None)


@mutant("L8", "pipeinfer")
def the_drafter_forgets_its_guesses_and_not_their_slots(patch: pytest.MonkeyPatch) -> None:
    def restart(original: Any, drafter: Drafter, sequence: Any) -> None:
        release = drafter._allocator.release
        drafter._allocator.release = lambda sequence, *slots: None  # type: ignore[method-assign]
        original(drafter, sequence)
        drafter._allocator.release = release  # type: ignore[method-assign]

    wrap(patch, Drafter, "_restart", restart)


@mutant("L11", "pipeinfer")
def a_token_below_the_cutoff_is_sent(patch: pytest.MonkeyPatch) -> None:
    def children(original: Any, drafter: Drafter, sequence: Any, node: Any, choices: Any) -> Any:
        cutoff, sequence.cutoff = sequence.cutoff, sequence.cutoff / 2
        found = original(drafter, sequence, node, choices)
        sequence.cutoff = cutoff
        return found

    wrap(patch, Drafter, "_children", children)


# Rounds.


@mutant("L11", "rounds")
def a_round_begins_before_the_last_one_is_back(patch: pytest.MonkeyPatch) -> None:
    def step(original: Any, schedule: Rounds, now: Any) -> Any:
        for tree in now.trees:
            is_out = schedule._phases[tree.sequence] is _Phase.VERIFYING and tree.root.run is not None
            if is_out and tree.root.position % 5 == 4:
                schedule._phases[tree.sequence] = _Phase.TURNING
        return original(schedule, now)

    wrap(patch, Rounds, "next", step)


@mutant("L11", "rounds")
def a_round_does_not_wait_for_its_drafts(patch: pytest.MonkeyPatch) -> None:
    def step(original: Any, schedule: Rounds, now: Any) -> Any:
        for tree in now.trees:
            if schedule._phases[tree.sequence] is _Phase.DRAFTING:
                schedule._phases[tree.sequence] = _Phase.READY
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
        body = message.body
        if isinstance(body, Result) and body in machine._deferred and body.run % 3 == 2:
            machine._deferred.remove(body)
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
    def accepted(original: Any, schedule: PipeInfer, *rest: Any) -> Any:
        decided = original(schedule, *rest)
        schedule._owes_restart = False
        return decided

    wrap(patch, PipeInfer, "accepted", accepted)


@mutant("L11", "pipeinfer")
def everybody_is_told_at_once_what_to_cancel(patch: pytest.MonkeyPatch) -> None:
    def cancel(original: Any, advice: Advice, *rest: Any) -> Any:
        sends = original(advice, *rest)
        if advice._policy.cancel != "relay" or not sends:
            return sends
        message = sends[0].message
        body = message.body._replace(relay=False)
        return [Send(message._replace(dest=stage, body=body)) for stage in advice._stages]

    wrap(patch, Advice, "cancel", cancel)


@mutant("L8")
def a_draft_goes_on_beyond_its_positions(patch: pytest.MonkeyPatch) -> None:
    def take(original: Any, sequence: DraftSequence, message: Any, policy: Any, positions: int) -> Any:
        return original(sequence, message, policy, 1 << 30)

    wrap(patch, DraftSequence, "take_prompt", take)
