"""Faults of sampling: who draws the target's next token, by which settings, where, and after what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kvbuffers.slot_table import SlotTable
from pipeinfer.core.messages import Settings
from pipeinfer.core.ports import GREEDY, Sampling
from speculation.drafter.machine import Drafter
from stages.stage.machine import Stage
from tests.invariants.hunt import Mutant, roll, wrap

DRAWING: list[Mutant] = []
mutant = roll(DRAWING)


@mutant("L1")
def a_stage_draws_as_for_the_sequence_before(patch: pytest.MonkeyPatch) -> None:
    def receive(original: Any, stage: Stage, event: Any) -> Any:
        before = list(stage._sampling.values())[-1:]
        commands = original(stage, event)
        if isinstance(event.message.body, Settings) and before:
            stage._sampling[event.message.body.sequence] = before[0]
        return commands

    wrap(patch, Stage, "_receive", receive)


@mutant("L1")
def a_stage_passes_on_other_settings(patch: pytest.MonkeyPatch) -> None:
    def send(original: Any, stage: Stage, dest: int, body: Any, *rest: Any) -> Any:
        return original(stage, dest, GREEDY.settings(body.sequence, 0) if isinstance(body, Settings) else body, *rest)

    wrap(patch, Stage, "_send", send)


@mutant("L1")
def settings_are_those_of_the_sequence_before(patch: pytest.MonkeyPatch) -> None:
    told = [GREEDY]

    def settings(original: Any, sampling: Sampling, *rest: int) -> Any:
        told.append(sampling)
        return original(told[-2], *rest)

    wrap(patch, Sampling, "settings", settings)


@mutant("L1")
def half_of_the_seed_is_lost(patch: pytest.MonkeyPatch) -> None:
    of = Sampling.of
    patch.setattr(Sampling, "of", lambda settings: replace(found := of(settings), seed=found.seed & 0xFFFFFFFF))


@mutant("L1")
def the_target_draws_at_the_rows_own_position(patch: pytest.MonkeyPatch) -> None:
    def draw(original: Any, table: SlotTable, sampling: Any, batch: Any, rows: Any, is_guess: bool = False) -> Any:
        found = original(table, sampling, batch, rows, is_guess)
        return found if is_guess else replace(found, positions=found.positions - 1)

    wrap(patch, SlotTable, "draw", draw)


@mutant("L1")
def what_was_seen_lacks_the_rows_own_token(patch: pytest.MonkeyPatch) -> None:
    def draw(original: Any, table: SlotTable, sampling: Any, batch: Any, rows: Any, is_guess: bool = False) -> Any:
        others = np.delete(batch.ancestors, batch.ancestor_ends - 1)
        ends = batch.ancestor_ends - np.arange(1, len(batch.slots) + 1)
        return original(table, sampling, replace(batch, ancestors=others, ancestor_ends=ends), rows, is_guess)

    wrap(patch, SlotTable, "draw", draw)


@mutant("L1", "rounds")
def what_was_seen_is_what_others_saw(patch: pytest.MonkeyPatch) -> None:
    def draw(original: Any, table: SlotTable, sampling: Any, batch: Any, rows: Any, is_guess: bool = False) -> Any:
        found = original(table, sampling, batch, rows, is_guess)
        return replace(found, seen=tuple(found.seen[-1:]) * len(found.seen))

    wrap(patch, SlotTable, "draw", draw)


@mutant("L10", "pipeinfer")
def the_drafter_is_greedy_whatever_the_target_does(patch: pytest.MonkeyPatch) -> None:
    def begin(original: Any, drafter: Drafter, sequence: int, sampling: Any) -> Any:
        return original(drafter, sequence, GREEDY)

    wrap(patch, Drafter, "_begin", begin)
