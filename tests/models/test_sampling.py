"""Sampling: the processors are transformers' and vLLM's, and what is drawn follows the softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeinfer.core.messages import NO_TOKEN
from pipeinfer.core.ports import GREEDY, Sampling, SamplingInputs
from stages.kernels.sampling import changes_nothing, drawing_scores, noise, processed
from stages.kernels.top_tokens import top_tokens
from stages.models.generic import GenericShard
from stages.models.generic_spec import GenericSpec
from tests.models.tiny import make_tiny
from tests.models.walk import Reference, compute, load_shards, make_batch

VOCAB = 97
PROCESSORS = {
    "temperature": Sampling(0.7),
    "hot": Sampling(3.0),
    "top-k": Sampling(1.0, top_k=5),
    "top-k beyond the vocabulary": Sampling(1.0, top_k=1000),
    "top-p": Sampling(1.0, top_p=0.75),
    "top-p of nearly nothing": Sampling(1.0, top_p=1e-6),
    "min-p": Sampling(1.0, min_p=0.125),
    "min-p of all": Sampling(1.0, min_p=1.0),
    "penalty": Sampling(1.0, repetition_penalty=1.5),
    "reward": Sampling(1.0, repetition_penalty=0.5),
    "everything": Sampling(0.75, 40, 0.9375, 0.03125, 1.25, seed=3),
}
OURS = {
    "presence": Sampling(1.0, presence_penalty=1.5),
    "frequency": Sampling(0.5, frequency_penalty=-0.75),
    "both": Sampling(presence_penalty=-0.5, frequency_penalty=0.25),
    "bias": Sampling(logit_bias=((3, 5.5), (96, -100.0), (500, 100.0))),
    "bias and all penalties": Sampling(
        0.75, 40, 0.9375, 0.03125, 1.25, 3, 0.5, 0.25, 2, logit_bias=((3, 5.5), (7, -0.3), (96, -100.0))
    ),
}
"""Those that transformers has no processors for."""
KINDS = ("plain", "ties", "flat", "peaked")


def logits_of(kind: str, rows: int = 12, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    logits = 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":  # bf16 models make many
        return logits.round()
    if kind == "flat":
        return torch.zeros(rows, vocab)
    if kind == "peaked":
        logits[:, vocab // 2] = 80.0
    return logits


def draw_of(
    sampling: Sampling, rows: int, first: int = 100, is_guess: bool = False, vocab: int = VOCAB
) -> SamplingInputs:
    """A draw at neighbouring positions; row r has seen some tokens of its own."""
    seen = tuple(np.unique(np.random.default_rng(row).integers(0, vocab, 20)) for row in range(rows))
    texts = [np.random.default_rng(100 + row).integers(0, min(vocab, 12), 20) for row in range(rows)]
    return SamplingInputs((sampling,) * rows, np.arange(first, first + rows), seen, is_guess, tuple(texts))


def theirs(sampling: Sampling) -> Any:
    """transformers' processors, in the order of its ``generate``."""
    found = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


def by_transformers(logits: torch.Tensor, draw: SamplingInputs) -> torch.Tensor:
    processors = theirs(draw.samplings[0])
    rows = zip(draw.seen, logits, strict=True)
    return torch.cat([processors(torch.from_numpy(seen)[None], row[None].clone()) for seen, row in rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_processors_are_those_of_transformers(name: str, kind: str) -> None:
    for seed in range(8):
        logits = logits_of(kind, seed=seed)
        before = logits.clone()
        draw = draw_of(PROCESSORS[name], len(logits))
        ours = processed(logits, draw)
        same(ours, by_transformers(logits, draw))
        assert (ours > -torch.inf).any(-1).all(), "one token is always left"
        assert torch.equal(logits, before)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal bits; but of tokens that are equally likely, the last ones that top_p keeps, transformers takes any."""
    assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
    for mine, its in zip(ours, theirs, strict=True):
        last = mine[mine > -torch.inf].min()
        assert torch.equal(mine[its > last], its[its > last])
        odd = mine != its
        assert torch.isin(torch.maximum(mine, its)[odd], last).all()


def by_the_book(logits: torch.Tensor, draw: SamplingInputs) -> torch.Tensor:
    """Logits after bias and penalties, number by number in 32 bits; then transformers' processors."""
    found = []
    for row, sampling, seen, generated in zip(logits, draw.samplings, draw.seen, draw.generated, strict=True):
        scores, text, biases = row.numpy().copy(), generated.tolist(), dict(sampling.logit_bias)
        for token in range(len(scores)):
            score, count = scores[token], np.float32(text.count(token))
            score += np.float32(biases.get(token, 0.0))
            if sampling.repetition_penalty != 1 and token in seen:
                factor = np.float32(sampling.repetition_penalty)
                score = score * factor if score < 0 else score / factor
            score -= np.float32(sampling.frequency_penalty) * count
            score -= np.float32(sampling.presence_penalty) * np.float32(count > 0)
            scores[token] = score
        rest = [] if sampling.temperature == 0 else theirs(replace(sampling, repetition_penalty=1.0))
        processed = torch.from_numpy(scores)[None]
        for processor in rest:
            processed = processor(None, processed)
        found.append(processed)
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OURS)
def test_biases_and_penalties_are_those_of_openai_in_vllm_s_order(name: str, kind: str) -> None:
    for seed in range(8):
        logits = logits_of(kind, seed=seed)
        before, draw = logits.clone(), draw_of(OURS[name], len(logits))
        ours = processed(logits, draw)
        same(ours, by_the_book(logits, draw))
        assert not torch.equal(ours, logits)
        assert torch.equal(logits, before)
        assert not changes_nothing(OURS[name])


def test_what_was_generated_is_counted_and_the_rest_of_the_text_is_not() -> None:
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    generated = np.array([1, 3, 1, -2, 9]), np.array([], np.int64)
    draw = SamplingInputs((sampling,) * 2, np.arange(2), generated=generated)
    assert processed(torch.ones(2, 4), draw).tolist() == [[1.0, 0.0, 1.0, 0.25], [1.0] * 4]


def test_the_most_probable_tokens_come_behind_what_is_drawn() -> None:
    """By the model's own logits, whatever is drawn; ties go to the lower token; each row has as many as it wants."""
    logits = logits_of("ties", rows=24, vocab=40)
    wanted = [0, 1, 5, 20, 3, 0]
    samplings = [replace(sampling, top_logprobs=0) for sampling in (GREEDY, *PROCESSORS.values(), *OURS.values())]
    mixed = tuple([replace(samplings[row % len(samplings)], top_logprobs=wanted[row % 6]) for row in range(24)])
    draw = replace(draw_of(GREEDY, 24, vocab=40), samplings=mixed)
    found = top_tokens(logits, 1, draw)
    plain = replace(draw, samplings=tuple([replace(sampling, top_logprobs=0) for sampling in mixed]))
    for row, ((drawn,), choices) in enumerate(zip(top_tokens(logits, 1, plain), found, strict=True)):
        assert choices[0] == drawn
        own = logits[row].log_softmax(-1).tolist()
        best = sorted(range(40), key=lambda token: (-logits[row, token].item(), token))[: wanted[row % 6]]
        assert [token for token, _ in choices[1:]] == best
        assert [logp for _, logp in choices[1:]] == pytest.approx([own[token] for token in best], abs=1e-5)
        assert not [logp for token, logp in choices[1:] if token == drawn[0] and logp != drawn[1]], "equal bits"
    assert top_tokens(logits, 4, replace(draw, is_guess=True)) == top_tokens(logits, 4, replace(plain, is_guess=True))


def test_a_token_that_is_given_stands_for_what_would_be_drawn() -> None:
    logits = logits_of("plain", rows=24, vocab=40)
    samplings = (Sampling(top_logprobs=2), Sampling(), Sampling(0.8, top_k=3))
    draw = replace(draw_of(GREEDY, 24, vocab=40), samplings=tuple([samplings[row % 3] for row in range(24)]))
    given = tuple([NO_TOKEN if row % 3 == 2 else 7 * row % 40 for row in range(24)])
    drawn, found = top_tokens(logits, 1, draw), top_tokens(logits, 1, replace(draw, given=given))
    every = top_tokens(logits, 40)
    for row, token in enumerate(given):
        first = drawn[row][0] if token == NO_TOKEN else (token, dict(every[row])[token])
        assert found[row] == [first, *drawn[row][1:]], "with the bits of a token that is chosen"
    nothing = torch.full((1, 40), torch.nan)
    assert top_tokens(nothing, 1, SamplingInputs((GREEDY,), np.arange(1), given=(3,))) == [[]]


def test_there_are_no_more_most_probable_tokens_than_tokens() -> None:
    draw = SamplingInputs((Sampling(top_logprobs=20), Sampling(0.5, top_logprobs=2)), np.arange(2))
    found = top_tokens(torch.stack([torch.arange(3.0), torch.full((3,), torch.nan)]), 1, draw)
    assert [token for token, _ in found[0]] == [2, 2, 1, 0]
    assert found[1] == [], "of a row whose logits are not finite nothing is known"


def test_of_equally_likely_tokens_the_lowest_are_kept() -> None:
    draw = SamplingInputs((Sampling(1.0, top_p=0.5),), np.array([0]))
    assert (processed(torch.zeros(1, 8), draw) > -torch.inf).tolist() == [[True] * 4 + [False] * 4]


def test_a_large_vocabulary_is_processed_alike() -> None:
    logits = logits_of("plain", rows=2, vocab=50_000)
    draw = draw_of(Sampling(0.75, 0, 0.9375, 0.0, 1.25), 2, vocab=50_000)
    same(processed(logits, draw), by_transformers(logits, draw))


def test_no_rows_are_no_choices() -> None:
    for is_guess in (False, True):
        assert top_tokens(torch.zeros(0, VOCAB), 1, SamplingInputs((), np.arange(0), (), is_guess)) == []


def test_tokens_that_a_shorter_vocabulary_lacks_are_no_matter() -> None:
    draw = SamplingInputs((Sampling(0.0, repetition_penalty=2.0),), np.array([5]), (np.array([1, 2, 500]),))
    assert processed(torch.ones(1, 4), draw).tolist() == [[1.0, 0.5, 0.5, 1.0]]
    for biases, wanted in ((((4, 9.0),), [1.0] * 4), (((1, 2.0), (7, 1.0)), [1.0, 3.0, 1.0, 1.0])):
        biased = replace(draw, samplings=(Sampling(logit_bias=biases),))
        assert processed(torch.ones(1, 4), biased).tolist() == [wanted]


def test_greedy_is_what_it_always_was() -> None:
    assert changes_nothing(GREEDY)
    assert changes_nothing(Sampling(0.0, top_k=3, top_p=0.5, seed=9))
    logits = logits_of("ties")
    for is_guess in (False, True):
        for count in (1, 8):
            draw = draw_of(Sampling(0.0, top_k=3, seed=9), 12, is_guess=is_guess)
            assert top_tokens(logits, count, draw) == top_tokens(logits, count)


def test_a_penalty_alone_keeps_the_choice_greedy() -> None:
    logits = logits_of("plain")
    draw = draw_of(Sampling(0.0, repetition_penalty=8.0), 12)
    chosen = [row[0][0] for row in top_tokens(logits, 1, draw)]
    sampled = replace(draw, samplings=(Sampling(1.0, repetition_penalty=8.0),) * 12)
    assert chosen == by_transformers(logits, sampled).argmax(-1).tolist()
    assert chosen != logits.argmax(-1).tolist()


# What is drawn.


def p_value(counts: torch.Tensor, shares: torch.Tensor) -> float:
    """How often chance alone would deviate more: Pearson's chi-square."""
    expected = shares * counts.sum()
    assert expected.min() > 5
    squares = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2, dtype=torch.float64), squares / 2))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.5, seed=1), Sampling(2.0, top_k=6, seed=2), Sampling(1.5, 0, 0.875, 0.0, 1.5, seed=3)],
    ids=str,
)
def test_what_is_drawn_follows_the_processed_softmax(sampling: Sampling) -> None:
    vocab, rows = 12, 24_000
    row = torch.linspace(-1.5, 1.5, vocab)[None]
    seen = (np.array([0, 10, 11]),)
    shares = by_transformers(row, SamplingInputs((sampling,), np.arange(1), seen))[0].double().softmax(-1)
    draw = SamplingInputs((sampling,) * rows, np.arange(rows), seen * rows)
    drawn = torch.tensor([choices[0][0] for choices in top_tokens(row.expand(rows, vocab), 1, draw)])
    counts = drawn.bincount(minlength=vocab)
    assert not counts[shares == 0].any()
    assert p_value(counts[shares > 0], shares[shares > 0]) > 0.01


def test_seeds_are_independent_samples_too() -> None:
    vocab, samples = 6, 8_000
    row = torch.linspace(-1.0, 1.0, vocab)[None]
    draws = (SamplingInputs((Sampling(1.0, seed=seed),), np.array([9])) for seed in range(samples))
    drawn = torch.tensor([top_tokens(row, 1, draw)[0][0][0] for draw in draws])
    assert p_value(drawn.bincount(minlength=vocab), row[0].double().softmax(-1)) > 0.01


@pytest.mark.parametrize("is_guess", [False, True])
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_row_s_choices_do_not_depend_on_the_rows_beside_it(name: str, is_guess: bool) -> None:
    logits = logits_of("plain", rows=16, vocab=5000)
    draw = draw_of(PROCESSORS[name], 16, is_guess=is_guess, vocab=5000)
    together = top_tokens(logits, 4, draw)
    for group in ([3], [15, 0], [8, 7, 6, 5, 4]):
        assert top_tokens(logits[group], 4, draw.of(group)) == [together[row] for row in group]


@pytest.mark.parametrize("is_guess", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_each_row_is_drawn_by_its_own_sampling(count: int, is_guess: bool) -> None:
    """As if it were alone, to the bit; also where rows of several seeds or samplings take turns."""
    logits = logits_of("plain", rows=3 * (1 + len(PROCESSORS) + len(OURS)), vocab=40_000)
    named = (GREEDY, *PROCESSORS.values(), *OURS.values()) * 3
    samplings = tuple([replace(named[row], seed=row % 5, top_logprobs=row % 4) for row in range(len(logits))])
    draw = replace(draw_of(GREEDY, len(logits), is_guess=is_guess, vocab=40_000), samplings=samplings)
    together = top_tokens(logits, count, draw)
    for row in range(len(logits)):
        assert top_tokens(logits[[row]], count, draw.of([row])) == [together[row]], samplings[row]
    rows = [*range(5, len(logits), 2)][::-1]
    assert top_tokens(logits[rows], count, draw.of(rows)) == [together[row] for row in rows]


def test_rows_at_one_position_have_the_same_noise() -> None:
    logits = logits_of("plain", rows=1).expand(5, -1)
    draw = SamplingInputs((Sampling(1.0),) * 5, np.array([4, 4, 9, 4, 9]))
    first, second, third, fourth, fifth = top_tokens(logits, 8, draw)
    assert first == second == fourth
    assert third == fifth != first


def test_the_target_s_log_probabilities_are_those_of_its_own_logits() -> None:
    logits = logits_of("plain")
    own = logits.log_softmax(-1)
    for sampling in PROCESSORS.values():
        for row, ((token, logp),) in enumerate(top_tokens(logits, 1, draw_of(sampling, 12))):
            assert logp == pytest.approx(float(own[row, token]), abs=1e-5)


@pytest.mark.parametrize("name", [*PROCESSORS, "presence", "frequency", "bias and all penalties"])
def test_a_guess_is_ordered_by_what_decides(name: str) -> None:
    logits = logits_of("ties")
    draw = draw_of((PROCESSORS | OURS)[name], 12, is_guess=True)
    scores = drawing_scores(logits, draw)
    target = top_tokens(logits, 1, replace(draw, is_guess=False))
    for row, choices in enumerate(top_tokens(logits, 8, draw)):
        possible = int((scores[row] > -torch.inf).sum())
        assert len(choices) == min(8, possible), "what cannot be drawn is no guess"
        assert choices[0][0] == target[row][0][0] == top_tokens(logits, 1, draw)[row][0][0]
        wanted = scores[row].log_softmax(-1)
        assert [token for token, _ in choices] == wanted.topk(len(choices)).indices.tolist()
        assert [logp for _, logp in choices] == pytest.approx([float(wanted[token]) for token, _ in choices])


def agreement(target: torch.Tensor, draft: torch.Tensor, ours: Sampling, drafts: Sampling) -> float:
    def drawn(logits: torch.Tensor, sampling: Sampling, is_guess: bool) -> Sequence[int]:
        draw = SamplingInputs((sampling,) * len(logits), np.arange(len(logits)), (), is_guess)
        return [choices[0][0] for choices in top_tokens(logits, 1, draw)]

    pairs = zip(drawn(target, ours, False), drawn(draft, drafts, True), strict=True)
    return sum(mine == its for mine, its in pairs) / len(target)


def test_a_draft_with_the_target_s_noise_mostly_agrees() -> None:
    rows = 2000
    target = logits_of("plain", rows)
    draft = target + 0.5 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    shared = agreement(target, draft, Sampling(1.0, seed=1), Sampling(1.0, seed=1))
    apart = agreement(target, draft, Sampling(1.0, seed=1), Sampling(1.0, seed=2))
    print(f"a draft's first guess is drawn: {shared:.3f} with the target's noise, {apart:.3f} with noise of its own")
    assert shared > 0.75
    assert shared > 2 * apart


# Whole texts.


class Noise(LogitsProcessor):
    """Our noise as one more processor: then the best token of transformers' ``generate`` is the drawn one."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.double() + noise(self._seed, input_ids.shape[1], scores.shape[1])


def sampled(shard: Any, prompt: Sequence[int], count: int, sampling: Sampling) -> list[int]:
    """Plain decoding by a whole model, row by row."""
    tokens = list(prompt)
    for position in range(len(prompt) + count - 1):
        hidden = compute([shard], make_batch([tokens[position]], [position], [position], [set(range(position))]))
        if position == len(tokens) - 1:
            draw = SamplingInputs((sampling,), np.array([position + 1]), (np.unique(tokens),))
            tokens.append(shard.sample(hidden, [0], 1, draw)[0][0][0])
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["temperature", "penalty", "everything"])
def test_both_kinds_of_shards_say_what_transformers_says_with_the_same_noise(name: str, tmp_path: Path) -> None:
    sampling, prompt = replace(PROCESSORS[name], seed=2**63 + 5), [17, 300, 5, 17, 42]
    make_tiny(tmp_path, "LlamaForCausalLM", seed=4)
    processors = theirs(sampling)
    processors.append(Noise(sampling.seed))
    model = Reference(tmp_path).model
    out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24, logits_processor=processors)
    wanted = out[0, len(prompt) :].tolist()
    (shard,) = load_shards(tmp_path)
    assert sampled(shard, prompt, 24, sampling) == wanted
    spec = GenericSpec.read(tmp_path)
    assert sampled(GenericShard.load(spec, range(6), torch.float32, 32), prompt, 24, sampling) == wanted
    assert sampled(shard, prompt, 24, GREEDY) != wanted
