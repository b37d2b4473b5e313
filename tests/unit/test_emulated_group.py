"""Emulated groups: their ranks together are the undivided model, to the bit, and none goes on without the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeinfer.core.errors import LocalProtocolError, StallError
from pipeinfer.core.ports import GREEDY, Sampling, SamplingInputs
from pipeinfer.core.slots import batch_in_order
from pipeinfer.runtime.pass_times import pass_times
from stages.models.emulated import EmulatedShard, EmulatedSpec, finish, mix, spread
from stages.models.emulated_group import FUSED_ROWS, EmulatedGroup, share
from stages.models.group_shard import Follower

SPEC = EmulatedSpec(layers=4, vocab=1000, seed=5, ranks=spread(0.6), faulty=0.3, draft_faulty=0.3)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
SIZES = [1, 2, 3, 4, 8]
DRAWN = Sampling(0.75, 20, 0.875, 0.0625, 1.25, seed=7)


def draw(rows: int, sampling: Sampling) -> SamplingInputs:
    return SamplingInputs((sampling,) * rows, np.arange(rows), (np.array([2, 3, 5]),) * rows)


def said(shard: Any, sampling: Sampling) -> list[Any]:
    """All that ``shard`` tells of a prompt, and of the tokens after it one by one."""
    told: list[Any] = []
    for first, tokens in ((0, PROMPT), (8, [7]), (9, [1, 2])):
        hidden = finish(shard.forward(batch_in_order(tokens, first), None))
        told += [hidden.tolist(), dict(shard.faults)]
        told += [shard.sample(hidden, range(len(tokens)), 3, draw(len(tokens), sampling)), dict(shard.faults)]
    return told


@pytest.mark.parametrize("size", SIZES)
def test_shares_add_up(size: int) -> None:
    words = mix(np.arange(50, dtype=np.uint64))
    shares = [share(words, rank, size, 3) for rank in range(size)]
    assert np.array(shares).sum(axis=0, dtype=np.uint64).tolist() == words.tolist()
    assert len({tuple(one.tolist()) for one in shares}) == size


@pytest.mark.parametrize("is_draft", [False, True])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("size", SIZES)
def test_a_group_is_the_undivided_model(size: int, sampling: Sampling, is_draft: bool) -> None:
    alone = EmulatedShard(SPEC, range(4), 16, is_draft=is_draft)
    shared = EmulatedGroup(size).shard(SPEC, range(4), 16, is_draft=is_draft)
    assert said(shared, sampling) == said(alone, sampling)


@pytest.mark.parametrize("size", SIZES)
def test_a_group_draws_each_row_by_its_own_sampling(size: int) -> None:
    alone, shared = EmulatedShard(SPEC, range(4), 16), EmulatedGroup(size).shard(SPEC, range(4), 16)
    named = (Sampling(top_logprobs=3), DRAWN, Sampling(0.5), Sampling(0.5, presence_penalty=0.5, top_logprobs=2))
    batch, mixed = batch_in_order(PROMPT), replace(draw(8, DRAWN), samplings=named * 2, generated=(np.arange(3),) * 8)
    found = [shard.sample(finish(shard.forward(batch, None)), range(8), 3, mixed) for shard in (alone, shared)]
    assert found[0] == found[1]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_so_it_is_in_stages_that_one_group_shares(cut: int) -> None:
    group, batch = EmulatedGroup(3), batch_in_order(PROMPT)
    stages = [group.shard(SPEC, layers, 16) for layers in (range(cut), range(cut, 4))]
    hidden = None
    for stage in stages:
        hidden = finish(stage.forward(batch, hidden))
    whole = EmulatedShard(SPEC, range(4), 16)
    wanted = finish(whole.forward(batch, None))
    assert hidden is not None
    assert hidden.tolist() == wanted.tolist()
    rows = range(len(PROMPT))
    assert stages[1].sample(hidden, rows, 1) == whole.sample(wanted, rows, 1)
    assert stages[1].sample(hidden.copy(), rows, 1) == whole.sample(wanted, rows, 1), "activations that it sends"


@pytest.mark.parametrize("layers", [0, 1, 3, 4])
def test_an_abandoned_pass_leaves_nothing_behind(layers: int) -> None:
    shared = EmulatedGroup(2).shard(SPEC, range(4), 16)
    passes = shared.forward(batch_in_order([7] * 5), None)
    for _ in range(layers):
        next(passes)
    passes.close()
    assert said(shared, GREEDY) == said(EmulatedShard(SPEC, range(4), 16), GREEDY)


def test_cleared_slots_are_those_of_a_fresh_group() -> None:
    group = EmulatedGroup(2)
    shared = group.shard(SPEC, range(4), 16)
    said(shared, GREEDY)
    assert all(team.parts[0].holds(16) for team in group.teams[1:]), "a follower has slots of its own"
    shared.clear(16)
    assert not any(team.parts[0].holds(16) for team in group.teams[1:])


def test_pass_times_are_measured_of_a_group() -> None:
    shared = EmulatedGroup(2).shard(SPEC, range(4), 64, lambda rows, context: 0.25 * rows)
    assert pass_times(shared, 64, choices=1, clock=lambda: 0.0) == [(rows, 1.0 * rows) for rows in (1, 2, 4, 8, 16)]


def test_a_layer_takes_as_long_as_its_slowest_rank() -> None:
    batch = batch_in_order([1, 2])

    def times(size: int, late: float, seed: int = 1) -> list[float]:
        return list(EmulatedGroup(size, late, seed).shard(SPEC, range(4), 16, lambda *_: 2.0).forward(batch, None))

    assert times(4, 0.0) == [2.0] * 4
    few, many = times(2, 0.5), times(8, 0.5)
    assert few == times(2, 0.5) != times(2, 0.5, seed=2)
    assert all(2.0 < one <= other < 3.0 for one, other in zip(few, many, strict=True)), "the same two among the eight"


@pytest.mark.parametrize("missed", ["forward", "layer", "choose", "clear"])
def test_a_follower_that_misses_a_command_is_noticed(missed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = Follower.handle

    def deaf(follower: Follower, command: Any) -> bool:
        return True if missed in (command, command[0]) else handle(follower, command)

    monkeypatch.setattr(Follower, "handle", deaf)
    shared = EmulatedGroup(2).shard(SPEC, range(4), 16)

    def work() -> None:
        said(shared, GREEDY)
        shared.clear(16)

    with pytest.raises((LocalProtocolError, StallError)):
        work()


def test_a_rank_on_the_other_path_has_no_partner() -> None:
    group = EmulatedGroup(2)
    shared = group.shard(SPEC, range(4), 16)
    assert group.teams[0].fuses(FUSED_ROWS) > group.teams[0].fuses(FUSED_ROWS + 1)
    passes = shared.forward(batch_in_order(PROMPT), None)
    next(passes)
    group.teams[1].is_fused = True
    with pytest.raises(StallError, match="waits for part"):
        next(passes)
