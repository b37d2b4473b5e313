"""Faults of sampling: who draws the target's next token, by which settings, where, and after what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvbuffers.slot_table import SlotTable
from pipeinfer.core.ports import GREEDY, Sampling
from pipeinfer.core.protocol import Kind
from pipeinfer.orchestrator.machine import Orchestrator
from speculation.drafter.machine import Drafter
from stages.stage.machine import Stage
from tests.invariants.hunt import Mutant, roll, wrap

DRAWING: list[Mutant] = []
mutant = roll(DRAWING)


@mutant("L1")
def a_stage_forgets_a_new_request(patch: pytest.MonkeyPatch) -> None:
    def receive(original: Any, stage: Stage, event: Any) -> Any:
        before = stage._sampling
        commands = original(stage, event)
        if event.message.kind is Kind.REQUEST and before != GREEDY:
            stage._sampling = before
        return commands

    wrap(patch, Stage, "_receive", receive)


@mutant("L1")
def a_stage_passes_on_how_it_was_done_before(patch: pytest.MonkeyPatch) -> None:
    def send(original: Any, stage: Stage, kind: Kind, *rest: Any, **options: Any) -> Any:
        if kind is Kind.REQUEST:
            options["rows"] = GREEDY.rows()
        return original(stage, kind, *rest, **options)

    wrap(patch, Stage, "_send", send)


@mutant("L1")
def nobody_says_that_a_request_is_greedy(patch: pytest.MonkeyPatch) -> None:
    def begin(original: Any, machine: Orchestrator) -> Any:
        session = machine._session
        if session is not None and session.request.sampling == GREEDY:
            machine._sampling = GREEDY
        return original(machine)

    wrap(patch, Orchestrator, "_begin", begin)


@mutant("L1")
def half_of_the_seed_is_lost(patch: pytest.MonkeyPatch) -> None:
    of = Sampling.of
    patch.setattr(Sampling, "of", lambda rows: replace(found := of(rows), seed=found.seed & 0xFFFFFFFF))


@mutant("L1")
def the_target_draws_at_the_rows_own_position(patch: pytest.MonkeyPatch) -> None:
    def draw(original: Any, table: SlotTable, sampling: Any, batch: Any, rows: Any, is_guess: bool = False) -> Any:
        found = original(table, sampling, batch, rows, is_guess)
        return found if is_guess else replace(found, positions=found.positions - 1)

    wrap(patch, SlotTable, "draw", draw)


@mutant("L1")
def what_was_seen_lacks_the_rows_own_token(patch: pytest.MonkeyPatch) -> None:
    def draw(original: Any, table: SlotTable, sampling: Any, batch: Any, rows: Any, is_guess: bool = False) -> Any:
        others = batch.visible.copy()
        others[np.arange(len(batch.slots)), batch.slots] = False
        return original(table, sampling, replace(batch, visible=others), rows, is_guess)

    wrap(patch, SlotTable, "draw", draw)


@mutant("L1", "rounds")
def what_was_seen_is_what_others_saw(patch: pytest.MonkeyPatch) -> None:
    def draw(original: Any, table: SlotTable, sampling: Any, batch: Any, rows: Any, is_guess: bool = False) -> Any:
        found = original(table, sampling, batch, rows, is_guess)
        return replace(found, seen=tuple(found.seen[-1:]) * len(found.seen))

    wrap(patch, SlotTable, "draw", draw)


@mutant("L10", "pipeinfer")
def the_drafter_is_greedy_whatever_the_target_does(patch: pytest.MonkeyPatch) -> None:
    def draw(original: Any, drafter: Drafter, batch: Any, wanted: Any) -> Any:
        return replace(original(drafter, batch, wanted), sampling=GREEDY, seen=())

    wrap(patch, Drafter, "_draw", draw)
