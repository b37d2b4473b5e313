from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeinfer.core.ports import GREEDY, Batch, Sampling, SamplingInputs
from pipeinfer.core.slots import batch_in_order
from stages.models.emulated import EmulatedShard, EmulatedSpec, finish, mix, plain_scores, plain_tokens, spread

SPEC = EmulatedSpec(layers=4, vocab=1000, seed=5)


def prompt_batch(tokens: list[int]) -> Batch:
    return batch_in_order(tokens)


def one(token: int, position: int, slot: int, sees: list[int]) -> Batch:
    here, path = (np.array([token]), np.array([position]), np.array([slot])), np.array([*sees, slot])
    return Batch(*here, (np.zeros((0, 2), np.int64),), np.array([0]), np.array([0]), path, np.array([len(path)]))


def prompted(spec: EmulatedSpec = SPEC) -> EmulatedShard:
    shard = EmulatedShard(spec, range(spec.layers), 32)
    finish(shard.forward(prompt_batch([3, 1, 4, 1, 5, 9, 2, 6]), None))
    return shard


def said(batch: Batch) -> int:
    shard = prompted()
    return shard.sample(finish(shard.forward(batch, None)), (0,), 1)[0][0][0]


def test_any_cut_into_shards_gives_the_same_words() -> None:
    batch = prompt_batch([3, 1, 4, 1, 5])
    whole = finish(EmulatedShard(SPEC, range(4), 8).forward(batch, None))
    for cut in (1, 2, 3):
        hidden = finish(EmulatedShard(SPEC, range(cut), 8).forward(batch, None))
        assert finish(EmulatedShard(SPEC, range(cut, 4), 8).forward(batch, hidden)).tolist() == whole.tolist()


def test_a_prompt_at_once_or_token_by_token_says_the_same() -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    shard = EmulatedShard(SPEC, range(4), 32)
    at_once = shard.sample(finish(shard.forward(prompt_batch(prompt), None)), (7,), 1)[0][0][0]
    assert plain_tokens(SPEC, prompt, 1, frozenset()) == [at_once]


def test_every_bit_of_the_mask_matters() -> None:
    everything = list(range(8))
    right = said(one(7, 8, 8, everything))
    wrong = {said(one(7, 8, 8, [slot for slot in everything if slot != missing])) for missing in everything}
    assert right not in wrong
    assert len(wrong) == 8


@pytest.mark.parametrize(
    "batch",
    [one(8, 8, 8, list(range(8))), one(7, 9, 8, list(range(8)))],
    ids=["token", "position"],
)
def test_so_do_the_token_and_its_position(batch: Batch) -> None:
    assert said(batch) != said(one(7, 8, 8, list(range(8))))


def test_the_slot_itself_does_not_matter() -> None:
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
    truths = [choices[0][0] for choices in target.sample(hidden, rows, 1)]
    guesses = [[token for token, _ in choices] for choices in draft.sample(hidden, rows, 4)]
    for rank in range(4):
        hits = sum(guess[rank] == truth for guess, truth in zip(guesses, truths, strict=True))
        assert hits / 4000 == pytest.approx(ranks[rank] if rank < len(ranks) else 0.0, abs=0.03)
    assert all(len(set(guess)) == 4 for guess in guesses)


def test_the_draft_believes_its_claims() -> None:
    hidden = mix(np.arange(3, dtype=np.uint64))
    told = EmulatedSpec(layers=2, ranks=(0.5, 0.25), claims=(0.1,))
    for spec, wanted in ((told, [0.1, 1e-9]), (EmulatedSpec(layers=2, ranks=(0.5, 0.25)), [0.5, 0.25])):
        draft = EmulatedShard(spec, range(2), 8, is_draft=True)
        for choices in draft.sample(hidden, range(3), 2):
            assert [math.exp(logp) for _, logp in choices] == pytest.approx(wanted)


def test_spread_covers_what_it_says() -> None:
    ranks = spread(0.6, choices=5, cover=0.9)
    assert len(ranks) == 5
    assert sum(ranks) == pytest.approx(0.9)
    assert list(ranks[1:]) == sorted(ranks[1:], reverse=True)


def test_a_layer_rests_as_long_as_its_pace_says() -> None:
    shard = EmulatedShard(SPEC, range(3), 8, lambda rows, context: 0.5 * rows)
    assert list(shard.forward(prompt_batch([1, 2]), None)) == [1.0, 1.0, 1.0]


# Sampling.

SAMPLED = Sampling(0.75, 20, 0.875, 0.0625, 1.25, seed=7)
SEEN = np.array([2, 3, 5])
ROW = mix(np.arange(1, dtype=np.uint64))


def drawn(draw: SamplingInputs | None, spec: EmulatedSpec = SPEC) -> int:
    return EmulatedShard(spec, range(1), 8).sample(ROW, (0,), 1, draw)[0][0][0]


def test_every_number_of_a_draw_matters() -> None:
    spec = replace(SPEC, vocab=2**40)  # two of these words hardly ever give one token
    draw = SamplingInputs((SAMPLED,), np.array([9]), (SEEN,))
    changes = {
        "temperature": 1.0, "top_k": 21, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.5, "seed": 7 + 2**40,
    }  # fmt: skip
    draws = [None, draw, replace(draw, positions=np.array([10])), replace(draw, seen=(SEEN[:2],))]
    draws.append(replace(draw, seen=(np.array([2, 3, 6]),)))
    draws += [replace(draw, samplings=(replace(SAMPLED, **{name: value}),)) for name, value in changes.items()]  # type: ignore[arg-type]
    draws.append(replace(draw, samplings=(replace(SAMPLED, temperature=0.0),)))
    assert len({drawn(draw, spec) for draw in draws}) == len(draws)


def test_every_number_of_biases_and_of_penalties_of_what_was_generated_matters() -> None:
    spec, text = replace(SPEC, vocab=2**40), np.array([2, 3, 2])
    for temperature in (0.0, 0.5):
        sampling = Sampling(temperature, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((3, 1.0), (5, -1.0)))
        draw = SamplingInputs((sampling,), np.array([9]), generated=(text,))
        changes: list[dict[str, Any]] = [
            {"presence_penalty": 0.25}, {"frequency_penalty": 0.5}, {"frequency_penalty": 0.0}, {"logit_bias": ()},
            {"logit_bias": ((3, 1.0), (5, 1.0))}, {"logit_bias": ((3, 1.0), (6, -1.0))}, {"logit_bias": ((3, 1.0),)},
            {"presence_penalty": 0.0, "frequency_penalty": 0.0},
        ]  # fmt: skip
        draws = [replace(draw, samplings=(replace(sampling, **change),)) for change in changes]
        draws += [draw, replace(draw, generated=(text[:2],)), replace(draw, generated=(np.array([2, 3, 4]),))]
        draws.append(replace(draw, samplings=(Sampling(temperature),)))
        assert len({drawn(draw, spec) for draw in draws}) == len(draws)
        same = replace(draw, generated=(text[::-1],), samplings=(replace(sampling, prompt_length=3, top_logprobs=2),))
        assert drawn(same, spec) == drawn(draw, spec)
        present = replace(draw, samplings=(replace(sampling, frequency_penalty=0.0),))
        assert drawn(present, spec) == drawn(replace(present, generated=(np.array([3, 2]),)), spec), "it is a set"


def test_the_most_probable_tokens_begin_with_the_greedy_one() -> None:
    hidden, shard = mix(np.arange(4, dtype=np.uint64)), EmulatedShard(SPEC, range(1), 8)
    counts = 3, 0, 2, 1
    asked = zip((SAMPLED, GREEDY, GREEDY, SAMPLED), counts, strict=True)
    wanted = tuple([replace(sampling, top_logprobs=count) for sampling, count in asked])
    draw = SamplingInputs(wanted, np.arange(4), (SEEN,) * 4)
    found = shard.sample(hidden, range(4), 1, draw)
    greedy = [choices[0][0] for choices in shard.sample(hidden, range(4), 1, None)]
    assert [choices[1:] for choices in found] == [
        [((greedy[row] + index) % SPEC.vocab, -1.0 - index) for index in range(top)] for row, top in enumerate(counts)
    ]
    assert [choices[:1] for choices in found] == shard.sample(hidden, range(4), 1, unwanted(draw))
    draft = EmulatedShard(SPEC, range(1), 8, is_draft=True)
    assert draft.sample(hidden, range(4), 2, draw) == draft.sample(hidden, range(4), 2, unwanted(draw))


def test_scores_of_a_prompt_depend_on_all_before_them() -> None:
    prompt = [3, 1, 4, 1, 5, 9]
    found, fault = plain_scores(SPEC, prompt, 2)
    assert [choices[0][0] for choices in found] == prompt[1:]
    assert ([len(choices) for choices in found], fault) == ([3] * 5, None)
    for changed in range(6):
        other = plain_scores(SPEC, [*prompt[:changed], 7, *prompt[changed + 1 :]], 2)[0]
        same = [one[0] == two[0] for one, two in zip(found, other, strict=True)]
        assert same == [index + 1 < changed for index in range(5)]
    assert plain_scores(replace(SPEC, faulty=1.0), prompt, 0) == ([], 0)


def unwanted(draw: SamplingInputs) -> SamplingInputs:
    return replace(draw, samplings=tuple([replace(sampling, top_logprobs=0) for sampling in draw.samplings]))


def test_nothing_else_does() -> None:
    draw = SamplingInputs((SAMPLED,), np.array([9]), (SEEN,))
    assert drawn(replace(draw, seen=(np.array([5, 2, 3, 2]),))) == drawn(draw), "what was seen is a set"
    free = replace(draw, samplings=(replace(SAMPLED, repetition_penalty=1.0),))
    assert drawn(replace(free, seen=())) == drawn(free)
    rounded = replace(SAMPLED, temperature=float(np.float32(0.7)))
    asked = replace(SAMPLED, temperature=0.7)
    assert drawn(replace(draw, samplings=(asked,))) == drawn(replace(draw, samplings=(rounded,)))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.0, top_k=5, top_p=0.5, seed=3)], ids=str)
def test_greedy_draws_say_what_they_always_said(sampling: Sampling) -> None:
    assert drawn(SamplingInputs((sampling,), np.array([9]), (SEEN,))) == drawn(None)
    assert plain_tokens(SPEC, [1, 2, 3], 8, frozenset(), sampling) == plain_tokens(SPEC, [1, 2, 3], 8, frozenset())
    assert plain_tokens(SPEC, [1, 2, 3], 8, frozenset()) == [956, 577, 41, 780, 879, 971, 893, 459]


def test_a_row_draws_what_it_draws_alone() -> None:
    hidden = mix(np.arange(6, dtype=np.uint64))
    seen = tuple(np.arange(row) for row in range(6))
    shard = EmulatedShard(SPEC, range(1), 8)
    together = shard.sample(hidden, range(6), 1, SamplingInputs((SAMPLED,) * 6, np.arange(20, 26), seen))
    for row in range(6):
        alone = SamplingInputs((SAMPLED,), np.array([20 + row]), seen[row : row + 1])
        assert shard.sample(hidden, (row,), 1, alone) == [together[row]]


def test_each_row_draws_by_its_own_sampling() -> None:
    named = (SAMPLED, GREEDY, Sampling(0.5, seed=1), Sampling(repetition_penalty=1.25), Sampling(0.5, seed=2), SAMPLED)
    hidden, seen = mix(np.arange(6, dtype=np.uint64)), tuple(np.arange(row) for row in range(6))
    draw = SamplingInputs(named, np.arange(20, 26), seen)
    for is_draft in (False, True):
        shard = EmulatedShard(SPEC, range(1), 8, is_draft=is_draft)
        together = shard.sample(hidden, range(6), 2, draw)
        assert [shard.sample(hidden, (row,), 2, draw.of([row]))[0] for row in range(6)] == together
        greedy = shard.sample(hidden, range(6), 2, None)
        assert [row for row in range(6) if greedy[row][0][0] == together[row][0][0]] == [1], "the others are drawn"


def test_plain_tokens_are_drawn_by_what_was_generated() -> None:
    prompt, shard = [3, 1, 4, 1, 5], EmulatedShard(SPEC, range(4), 32)
    sampling, tokens = Sampling(0.5, presence_penalty=1.0, frequency_penalty=0.5, logit_bias=((3, 1.0),)), list(prompt)
    for count in range(6):
        hidden = finish(shard.forward(prompt_batch(tokens), None))
        draw = SamplingInputs((sampling,), np.array([len(tokens)]), generated=(np.array(tokens[5:], np.int64),))
        tokens.append(shard.sample(hidden, (len(tokens) - 1,), 1, draw)[0][0][0])
        assert plain_tokens(SPEC, prompt, count + 1, frozenset(), sampling) == tokens[5:]


def test_a_missing_set_of_seen_tokens_is_an_error() -> None:
    for sampling in (SAMPLED, Sampling(presence_penalty=1.0)):
        with pytest.raises(IndexError):
            drawn(SamplingInputs((sampling,), np.array([9])))


def test_the_draft_knows_what_the_target_will_draw() -> None:
    spec = EmulatedSpec(layers=2, vocab=1000, ranks=(0.7,))
    target, draft = (EmulatedShard(spec, range(2), 8, is_draft=is_draft) for is_draft in (False, True))
    hidden = mix(np.arange(4000, dtype=np.uint64))
    draw = SamplingInputs((SAMPLED,) * 4000, np.arange(4000) % 50, (SEEN,) * 4000)
    truths = target.sample(hidden, range(4000), 1, draw)
    for guess_draw, share in ((draw, 0.7), (None, 0.0)):
        guesses = draft.sample(hidden, range(4000), 1, guess_draw)
        hits = sum(guess[0][0] == truth[0][0] for guess, truth in zip(guesses, truths, strict=True))
        assert hits / 4000 == pytest.approx(share, abs=0.03)


def test_plain_tokens_are_drawn_with_their_positions_and_all_that_was_seen() -> None:
    prompt, shard = [3, 1, 4, 1, 5], EmulatedShard(SPEC, range(4), 32)
    tokens = list(prompt)
    for count in range(6):
        hidden = finish(shard.forward(prompt_batch(tokens), None))
        draw = SamplingInputs((SAMPLED,), np.array([len(tokens)]), (np.array(sorted(set(tokens))),))
        tokens.append(shard.sample(hidden, (len(tokens) - 1,), 1, draw)[0][0][0])
        assert plain_tokens(SPEC, prompt, count + 1, frozenset(), SAMPLED) == tokens[len(prompt) :]
