"""Forced acceptance: the draft is right as often as it was told, and everything else is as it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeinfer.core.ports import Batch, SampledToken, Sampling, SamplingInputs
from stages.checkpoint.checkpoint import Checkpoint
from stages.checkpoint.spec import ModelSpec
from stages.models.forced import FORCED_TOKENS, ForcedShard
from stages.models.pair import CheckpointPair
from tests.models.tiny import VOCAB_SIZE, make_tiny_pair
from tests.models.walk import compute, make_batch

COUNT = 200
CAPACITY = 220


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_tiny_pair(tmp_path_factory.mktemp("pair"), "LlamaForCausalLM", seed=0)


def open_pair(directories: tuple[Path, Path], forced: Sequence[float]) -> CheckpointPair:
    target, draft = ((ModelSpec.read(place), Checkpoint(place)) for place in directories)
    return CheckpointPair(target, [draft], "fp32", forced)


def prompt_batch(seed: int) -> Batch:
    tokens = np.random.default_rng(seed).integers(VOCAB_SIZE, size=COUNT).tolist()
    return make_batch(tokens, range(COUNT), range(COUNT), [set(range(row)) for row in range(COUNT)])


def said(
    shards: Sequence[Any], batch: Batch, count: int, draw: SamplingInputs | None = None
) -> list[list[SampledToken]]:
    return shards[-1].sample(compute(shards, batch), range(len(batch.tokens)), count, draw)


@pytest.mark.parametrize("ranks", [(0.0,), (1.0,), (0.7,), (0.5, 0.3, 0.1)], ids=str)
@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, repetition_penalty=1.2, seed=5)], ids=str)
def test_the_draft_is_right_as_often_as_it_was_told(
    ranks: tuple[float, ...], sampling: Sampling | None, directories: tuple[Path, Path]
) -> None:
    pair, hits = open_pair(directories, ranks), np.zeros(4)
    target, draft = [pair.stage(range(6), CAPACITY)], [pair.draft(0, CAPACITY)]
    for seed in range(5):
        batch, draw = prompt_batch(seed), None
        if sampling:
            seen = tuple(np.unique(batch.tokens[: row + 1]) for row in range(COUNT))
            draw = SamplingInputs((sampling,) * len(seen), batch.positions + 1, seen)
        truths = [choices[0][0] for choices in said(target, batch, 1, draw)]
        assert max(truths) < FORCED_TOKENS
        assert len(set(truths)) > COUNT / 2
        for truth, guess in zip(truths, said(draft, batch, 4, draw), strict=True):
            hits += [token == truth for token, _ in guess]
    assert (hits / (5 * COUNT)).tolist() == pytest.approx([*ranks, 0, 0, 0][:4], abs=0.05)


def test_any_cut_says_the_same_and_computes_what_it_always_did(directories: tuple[Path, Path]) -> None:
    forced, real = open_pair(directories, (0.5,)), open_pair(directories, ())
    batch = prompt_batch(1)
    whole = [forced.stage(range(6), CAPACITY)]
    halves = [forced.stage(range(3), CAPACITY), forced.stage(range(3, 6), CAPACITY)]
    assert [isinstance(shard, ForcedShard) for shard in halves] == [False, True]
    assert said(halves, batch, 1) == said(whole, batch, 1)
    plain = [real.stage(range(6), CAPACITY)]
    assert torch.equal(compute(whole, batch), compute(plain, batch))
    assert whole[0].weight_nbytes == plain[0].weight_nbytes
    assert said(plain, batch, 1) != said(whole, batch, 1)


def test_a_hidden_slot_changes_the_word(directories: tuple[Path, Path]) -> None:
    """So plain decoding is the oracle here as well: masks, parents and commits all show."""
    shards = [open_pair(directories, (0.5,)).stage(range(6), CAPACITY)]
    compute(shards, prompt_batch(2))
    visible_slots = [set(range(COUNT)), *(set(range(COUNT)) - {slot} for slot in range(0, COUNT, 10))]
    words = [said(shards, make_batch([7], [COUNT], [COUNT], [slots]), 1)[0][0][0] for slots in visible_slots]
    assert words[0] not in words[1:]


def test_the_real_choice_is_computed_as_well(directories: tuple[Path, Path]) -> None:
    class Watched:
        """A real shard that remembers what it was asked."""

        def __init__(self, shard: Any) -> None:
            self.forward, self._sample, self.weight_nbytes = shard.forward, shard.sample, shard.weight_nbytes
            self.asked: list[tuple[Sequence[int], int, SamplingInputs | None]] = []

        def sample(
            self, hidden: Any, rows: Sequence[int], count: int, draw: SamplingInputs | None = None
        ) -> list[list[SampledToken]]:
            self.asked.append((rows, count, draw))
            chosen: list[list[SampledToken]] = self._sample(hidden, rows, count, draw)
            return chosen

    watched = Watched(open_pair(directories, ()).draft(0, CAPACITY))
    shard = ForcedShard(watched, (0.5,), CAPACITY, is_draft=True)
    batch = prompt_batch(3)
    draw = SamplingInputs((Sampling(temperature=1.0),) * 2, batch.positions[[4, 9]] + 1, is_guess=True)
    shard.sample(compute([shard], batch), (4, 9), 3, draw)  # type: ignore[list-item]
    assert watched.asked == [((4, 9), 3, draw)]
