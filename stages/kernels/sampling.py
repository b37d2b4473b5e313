"""From logits to the scores by which a token is drawn: processors, then noise.

    token = argmax over v of (z_v + g_v),   g_v = -log(-log(u_v)),   u_v = Philox(seed, position, v) in (0, 1)

z_v is the processed logit of token v. By the Gumbel-max trick the token is a sample of softmax(z). u_v depends on the
seed, the position and the token alone: it is the token's number of a counter-based generator. Every run and every batch
therefore samples the same token at a position. A draft model with the same noise mostly samples the target's token.

The processors are, in the order of vLLM's sampler: the grammar's mask, logit bias, the penalties (repetition,
frequency, presence) and temperature; then top_k, top_p and min_p in the order of transformers. Those that transformers
has give its bits; only which of equal tokens top_p keeps is left to the processor's sorting there, and is the lowest
ones here. All treat every row by itself, so that a row's token cannot depend on the rows beside it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeinfer.core.ports import Sampling, SamplingInputs

NOISES = 32
"""Positions whose noise is kept: 39 MB for a vocabulary of 152,000 tokens."""
SAMPLINGS = 1024
"""Samplings that are remembered."""
NEVER = float("-inf")


def changes_nothing(sampling: Sampling) -> bool:
    """Whether the most probable token is what ``sampling`` draws."""
    is_changed = sampling.repetition_penalty != 1 or sampling.penalises_generated or bool(sampling.logit_bias)
    return sampling.temperature == 0 and not is_changed and not sampling.grammar


def alike(draw: SamplingInputs) -> list[list[int]]:
    """The rows of ``draw`` in groups that have the same processors."""
    groups: dict[Sampling, list[int]] = {}
    for row, sampling in enumerate(draw.samplings):
        groups.setdefault(processors(sampling), []).append(row)
    return list(groups.values())


@lru_cache(SAMPLINGS)
def processors(sampling: Sampling) -> Sampling:
    """``sampling`` without what its processors do not depend on, or only by way of a draw's other fields."""
    return replace(sampling, seed=0, top_logprobs=0, prompt_length=0, prompt_logprobs=None)


def drawing_scores(logits: Tensor, draw: SamplingInputs) -> Tensor:
    """``logits`` (float32 [rows, vocabulary], in the processor's memory) after the processors, with the draw's noise:
    float64 [rows, vocabulary], or float32 where it is greedy. The highest of a row is the token that is drawn; tokens
    that cannot be drawn have minus infinity. The rows are alike (see ``alike``)."""
    scores = processed(logits, draw)
    if not draw.samplings or draw.samplings[0].temperature == 0:
        return scores
    scores = scores.double()
    for row, sampling, position in zip(scores, draw.samplings, draw.positions.tolist(), strict=True):
        row += noise(sampling.seed, position, len(row))
    return scores


def processed(logits: Tensor, draw: SamplingInputs) -> Tensor:
    """``logits`` (float32 [rows, vocabulary], of rows that are alike) after the processors; temperature and those
    that follow it are not for greedy choice, whose result they cannot change."""
    if not draw.samplings:
        return logits
    sampling, scores = draw.samplings[0], logits
    if sampling.grammar:
        scores = _masked(scores, draw)
    if sampling.logit_bias:
        scores = _biased(scores, sampling)
    if sampling.repetition_penalty != 1:
        scores = _penalised(scores, draw)
    if sampling.penalises_generated:
        scores = _varied(scores, draw)
    if sampling.temperature == 0:
        return scores
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    if sampling.top_k:
        floors = scores.topk(min(sampling.top_k, scores.shape[-1]), -1).values[:, -1:]
        scores = scores.masked_fill(scores < floors, NEVER)
    if sampling.top_p < 1:
        scores = scores.clone()
        for row in scores:
            row.masked_fill_(_tail(row, sampling.top_p), NEVER)
    if sampling.min_p:
        shares = scores.softmax(-1)
        scores = scores.masked_fill(shares < sampling.min_p * shares.amax(-1, keepdim=True), NEVER)
    return scores


def _masked(logits: Tensor, draw: SamplingInputs) -> Tensor:
    """Only what the grammar allows can be drawn. A draft whose shorter vocabulary has none of it guesses freely."""
    scores = logits.clone()
    for row, mask in zip(scores, draw.masks, strict=True):
        known = torch.from_numpy(mask[: len(row)])
        if known.any():
            row[: len(known)].masked_fill_(~known, NEVER)
            row[len(known) :] = NEVER
    return scores


def _penalised(logits: Tensor, draw: SamplingInputs) -> Tensor:
    """Seen tokens become less likely, whatever the sign of their logits."""
    penalty, scores = draw.samplings[0].repetition_penalty, logits.clone()
    for row, seen in zip(scores, draw.seen, strict=True):
        # A draft's vocabulary may be the shorter one, and what stands for a faulty row is no token.
        tokens = torch.from_numpy(seen[(seen >= 0) & (seen < len(row))])
        known = row[tokens]
        row[tokens] = torch.where(known < 0, known * penalty, known / penalty)
    return scores


def _biased(logits: Tensor, sampling: Sampling) -> Tensor:
    """What the bias of each token adds; no token has two. A draft's vocabulary may be the shorter one."""
    scores, known = logits.clone(), {token: bias for token, bias in sampling.logit_bias if token < logits.shape[-1]}
    scores[:, list(known)] += torch.tensor(list(known.values()))
    return scores


def _varied(logits: Tensor, draw: SamplingInputs) -> Tensor:
    """Generated tokens become less likely, by how often they were generated and because they were."""
    sampling, scores = draw.samplings[0], logits.clone()
    for row, generated in zip(scores, draw.generated, strict=True):
        found = np.unique(generated[(generated >= 0) & (generated < len(row))], return_counts=True)
        tokens, counts = torch.from_numpy(found[0]), torch.from_numpy(found[1]).float()
        row[tokens] = row[tokens] - sampling.frequency_penalty * counts - sampling.presence_penalty
    return scores


def _tail(scores: Tensor, top_p: float) -> Tensor:
    """The least likely tokens of one row, float32 [vocabulary], that together have no more than 1 - ``top_p``: bool
    [vocabulary]. Never the likeliest; of equal ones the highest tokens first.

    Only values are sorted: with the tokens beside them it takes twenty times as long."""
    ordered = torch.from_numpy(np.sort(scores.numpy()))
    count = min(int((ordered.softmax(-1).cumsum(-1) <= 1 - top_p).sum()), len(scores) - 1)
    removed = scores < ordered[count]
    equal = (scores == ordered[count]).nonzero()[:, 0]
    kept = len(equal) - (count - int(removed.sum()))
    removed[equal[kept:]] = True
    return removed


@lru_cache(NOISES)
def noise(seed: int, position: int, count: int) -> Tensor:
    """Gumbel noise of tokens 0 to ``count`` - 1 at ``position``: float64 [count], not to be written to.

    Four words of Philox4x64-10 for each step of the counter's first number; the second is the position, the key the
    seed. The upper 52 bits of a word make u, as 53 could round to 1."""
    words = np.random.Philox(key=seed, counter=[0, position, 0, 0]).random_raw(count)
    uniform = (words >> np.uint64(12)).astype(np.float64)
    uniform += 0.5
    uniform *= 2.0**-52
    return torch.from_numpy(-np.log(-np.log(uniform)))
