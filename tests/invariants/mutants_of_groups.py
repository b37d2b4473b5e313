"""Faults of groups: what the leader forgets to tell, and what a rank that follows does not do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stages.models.emulated_group import EmulatedPart, EmulatedTeam
from stages.models.group_shard import Follower, GroupShard
from tests.invariants.hunt import Mutant, roll, wrap

GROUPS: list[Mutant] = []
mutant = roll(GROUPS)


def _name(command: Any) -> str:
    return command if isinstance(command, str) else command[0]


def _ignore(patch: pytest.MonkeyPatch, name: str, every: int = 1) -> None:
    """Followers miss every ``every``-th of the commands ``name``."""
    count = 0

    def handle(original: Any, follower: Follower, command: Any) -> bool:
        nonlocal count
        count += _name(command) == name
        if _name(command) == name and count % every == 0:
            return True
        return bool(original(follower, command))

    wrap(patch, Follower, "handle", handle)


@mutant("LocalProtocolError")
def a_follower_misses_an_abandon(patch: pytest.MonkeyPatch) -> None:
    _ignore(patch, "stop")


@mutant("LocalProtocolError")
def the_leader_tells_of_no_abandon(patch: pytest.MonkeyPatch) -> None:
    def tell(original: Any, team: EmulatedTeam, command: Any) -> None:
        if command != "stop":
            original(team, command)

    wrap(patch, EmulatedTeam, "tell", tell)


@mutant("StallError")
def a_follower_goes_on_with_the_abandoned_pass(patch: pytest.MonkeyPatch) -> None:
    def tell(original: Any, team: EmulatedTeam, command: Any) -> None:
        for other in team.others:
            other.is_computing = False  # or the team would notice first
        original(team, command)

    def handle(original: Any, follower: Follower, command: Any) -> bool:
        if _name(command) == "stop" or (_name(command) == "forward" and follower._passes is not None):
            return True
        return bool(original(follower, command))

    wrap(patch, EmulatedTeam, "tell", tell)
    wrap(patch, Follower, "handle", handle)


@mutant("LocalProtocolError")
def a_follower_skips_a_batch(patch: pytest.MonkeyPatch) -> None:
    _ignore(patch, "forward", every=5)


@mutant("L1")
def a_follower_computes_the_batch_before(patch: pytest.MonkeyPatch) -> None:
    def handle(original: Any, follower: Follower, command: Any) -> bool:
        if _name(command) == "forward":
            name, index, is_fused, batch, hidden = command
            before = getattr(follower, "before", None)
            follower.before = batch  # type: ignore[attr-defined]
            if before is not None and len(before.slots) == len(batch.slots):
                command = name, index, is_fused, before, hidden
        return bool(original(follower, command))

    wrap(patch, Follower, "handle", handle)


@mutant("StallError")
def a_follower_skips_a_layer(patch: pytest.MonkeyPatch) -> None:
    _ignore(patch, "layer", every=7)


@mutant("L1")
def a_follower_exchanges_a_layer_that_it_did_not_compute(patch: pytest.MonkeyPatch) -> None:
    def give(original: Any, team: EmulatedTeam, words: Any, *rest: Any) -> None:
        original(team, words if team.leads or team._count % 7 else np.zeros_like(words), *rest)

    wrap(patch, EmulatedTeam, "give", give)


@mutant("LocalProtocolError")
def a_follower_does_not_clear_its_slots(patch: pytest.MonkeyPatch) -> None:
    _ignore(patch, "clear")


@mutant("LocalProtocolError")
def a_follower_clears_too_few_slots(patch: pytest.MonkeyPatch) -> None:
    def clear(original: Any, part: EmulatedPart, slots: int) -> None:
        original(part, slots if part._team.leads else slots - 1)

    wrap(patch, EmulatedPart, "clear", clear)


@mutant("StallError")
def the_leader_tells_of_a_layer_after_its_own(patch: pytest.MonkeyPatch) -> None:
    def forward(original: Any, shard: GroupShard, batch: Any, hidden: Any) -> Any:
        group, part = shard._group, shard._part
        group.tell(("forward", shard._index, group.is_fused, batch, hidden))
        for layer_s in part.forward(batch, hidden):
            group.tell("layer")
            yield layer_s

    wrap(patch, GroupShard, "forward", forward)


@mutant("L1")
def a_follower_chooses_after_the_last_pass_of_another_shard(patch: pytest.MonkeyPatch) -> None:
    def handle(original: Any, follower: Follower, command: Any) -> bool:
        if _name(command) == "choose":
            name, index, _, rows, *rest = command
            others = [last for other, last in follower._last.items() if other != index and len(last) > max(rows)]
            if others:
                command = name, index, others[-1][rows], rows, *rest
        return bool(original(follower, command))

    wrap(patch, Follower, "handle", handle)


@mutant("L1")
def the_leader_keeps_the_draw_to_itself(patch: pytest.MonkeyPatch) -> None:
    def tell(original: Any, team: EmulatedTeam, command: Any) -> None:
        if _name(command) == "choose":
            name, index, x, rows, _, count = command
            command = name, index, x, rows, None, count
        original(team, command)

    wrap(patch, EmulatedTeam, "tell", tell)


@mutant("L1")
def the_leader_keeps_the_activations_to_itself(patch: pytest.MonkeyPatch) -> None:
    def tell(original: Any, team: EmulatedTeam, command: Any) -> None:
        original(team, (*command[:-1], None) if _name(command) == "forward" else command)

    wrap(patch, EmulatedTeam, "tell", tell)


@mutant("StallError")
def a_follower_decides_by_itself_how_exchanges_go(patch: pytest.MonkeyPatch) -> None:
    def handle(original: Any, follower: Follower, command: Any) -> bool:
        is_told = follower._group.is_fused
        found = bool(original(follower, command))
        if _name(command) == "forward":
            follower._group.is_fused = is_told
        return found

    wrap(patch, Follower, "handle", handle)
