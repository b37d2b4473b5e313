from __future__ import annotations

import math

import numpy as np
import pytest

from pipeinfer.ports import Batch
from stages.emulated import EmulatedShard, EmulatedSpec, finish, mix, plain_tokens, spread

SPEC = EmulatedSpec(layers=4, vocab=1000, seed=5)


def prompt_batch(tokens: list[int]) -> Batch:
    count = len(tokens)
    here = np.arange(count)
    return Batch(np.array(tokens), here, here, np.tril(np.ones((count, count), np.bool_)))


def one(token: int, position: int, slot: int, sees: list[int]) -> Batch:
    visible = np.zeros((1, max(*sees, slot) + 1), np.bool_)
    visible[0, [*sees, slot]] = True
    return Batch(np.array([token]), np.array([position]), np.array([slot]), visible)


def prompted(spec: EmulatedSpec = SPEC) -> EmulatedShard:
    shard = EmulatedShard(spec, range(spec.layers), 32)
    finish(shard.forward(prompt_batch([3, 1, 4, 1, 5, 9, 2, 6]), None))
    return shard


def said(batch: Batch) -> int:
    shard = prompted()
    return shard.choose(finish(shard.forward(batch, None)), (0,), 1)[0][0][0]


def test_any_cut_into_shards_gives_the_same_words() -> None:
    batch = prompt_batch([3, 1, 4, 1, 5])
    whole = finish(EmulatedShard(SPEC, range(4), 8).forward(batch, None))
    for cut in (1, 2, 3):
        hidden = finish(EmulatedShard(SPEC, range(cut), 8).forward(batch, None))
        assert finish(EmulatedShard(SPEC, range(cut, 4), 8).forward(batch, hidden)).tolist() == whole.tolist()


def test_a_prompt_at_once_or_token_by_token_says_the_same() -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    shard = EmulatedShard(SPEC, range(4), 32)
    at_once = shard.choose(finish(shard.forward(prompt_batch(prompt), None)), (7,), 1)[0][0][0]
    assert plain_tokens(SPEC, prompt, 1, frozenset()) == [at_once]


def test_every_bit_of_the_mask_matters() -> None:
    everything = list(range(8))
    right = said(one(7, 8, 8, everything))
    wrong = {said(one(7, 8, 8, [cell for cell in everything if cell != missing])) for missing in everything}
    assert right not in wrong
    assert len(wrong) == 8


@pytest.mark.parametrize(
    "batch",
    [one(8, 8, 8, list(range(8))), one(7, 9, 8, list(range(8)))],
    ids=["token", "position"],
)
def test_so_do_the_token_and_its_position(batch: Batch) -> None:
    assert said(batch) != said(one(7, 8, 8, list(range(8))))


def test_the_cell_itself_does_not_matter() -> None:
    assert said(one(7, 8, 20, list(range(8)))) == said(one(7, 8, 8, list(range(8))))


def test_plain_tokens_stop() -> None:
    tokens = plain_tokens(SPEC, [1, 2], 12, frozenset())
    assert len(tokens) == 12
    assert plain_tokens(SPEC, [1, 2], 12, frozenset({tokens[4]})) == tokens[:5]


@pytest.mark.parametrize("ranks", [(0.0,), (1.0,), (0.7,), (0.5, 0.3, 0.1), spread(0.6, choices=3)], ids=str)
def test_the_draft_is_right_as_often_as_it_was_told(ranks: tuple[float, ...]) -> None:
    spec = EmulatedSpec(layers=2, vocab=1000, ranks=ranks)
    target, draft = (EmulatedShard(spec, range(2), 8, is_draft=is_draft) for is_draft in (False, True))
    hidden = mix(np.arange(4000, dtype=np.uint64))
    rows = range(4000)
    truths = [choices[0][0] for choices in target.choose(hidden, rows, 1)]
    guesses = [[token for token, _ in choices] for choices in draft.choose(hidden, rows, 4)]
    for rank in range(4):
        hits = sum(guess[rank] == truth for guess, truth in zip(guesses, truths, strict=True))
        assert hits / 4000 == pytest.approx(ranks[rank] if rank < len(ranks) else 0.0, abs=0.03)
    assert all(len(set(guess)) == 4 for guess in guesses)


def test_the_draft_believes_its_claims() -> None:
    hidden = mix(np.arange(3, dtype=np.uint64))
    told = EmulatedSpec(layers=2, ranks=(0.5, 0.25), claims=(0.1,))
    for spec, wanted in ((told, [0.1, 1e-9]), (EmulatedSpec(layers=2, ranks=(0.5, 0.25)), [0.5, 0.25])):
        draft = EmulatedShard(spec, range(2), 8, is_draft=True)
        for choices in draft.choose(hidden, range(3), 2):
            assert [math.exp(logp) for _, logp in choices] == pytest.approx(wanted)


def test_spread_covers_what_it_says() -> None:
    ranks = spread(0.6, choices=5, cover=0.9)
    assert len(ranks) == 5
    assert sum(ranks) == pytest.approx(0.9)
    assert list(ranks[1:]) == sorted(ranks[1:], reverse=True)


def test_a_layer_rests_as_long_as_its_pace_says() -> None:
    shard = EmulatedShard(SPEC, range(3), 8, lambda rows: 0.5 * rows)
    assert list(shard.forward(prompt_batch([1, 2]), None)) == [1.0, 1.0, 1.0]
