"""From logits to the best tokens, the same for every shard, target or draft."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeinfer.core.ports import SampledToken, SamplingInputs
from stages.kernels.sampling import changes_nothing, drawing_scores


def top_tokens(
    logits: Tensor, count: int, draw: SamplingInputs | None = None, log_totals: Tensor | None = None
) -> list[list[SampledToken]]:
    """The ``count`` best tokens of each row of ``logits`` (float32 [rows, vocabulary]) with their log-probabilities,
    best first; of equal ones the lowest token, as argmax has it. None of a row whose logits are not finite.

    With a ``draw`` they are ordered by the scores that decide it, so that the first is the token that is drawn; tokens
    that cannot be drawn are left out, even if fewer remain. The log-probabilities are those of ``logits`` all the same,
    but for a guess those of the deciding scores. See ShardModel.sample. ``log_totals``: float32 [rows, 1], logsumexp of
    the logits where it is known."""
    if draw is None or changes_nothing(draw.sampling):
        return _ranked(logits, count, logits, log_totals)
    logits = logits.cpu()  # where noise is made
    scores = drawing_scores(logits, draw)
    if draw.is_guess:
        return _ranked(scores, count, scores, None)
    return _ranked(scores, count, logits, log_totals)


def _ranked(scores: Tensor, count: int, raw: Tensor, totals: Tensor | None) -> list[list[SampledToken]]:
    """The ``count`` best tokens of each row by ``scores``, with their log-probabilities by ``raw``, whose logsumexp is
    ``totals``."""
    if totals is None:
        totals = torch.logsumexp(raw, -1, keepdim=True)
    if count == 1:
        best = scores.argmax(-1, keepdim=True)
        logps = raw.gather(-1, best) - totals  # finite where the total is
        found = zip(best[:, 0].tolist(), logps[:, 0].tolist(), strict=True)
        return [[choice] if math.isfinite(choice[1]) else [] for choice in found]
    # topk leaves open which of equal scores it takes and in what order; only its lowest value is used.
    count = min(count, scores.shape[-1])
    floors = scores.topk(count, -1).values[:, -1:].clamp_min(torch.finfo(scores.dtype).min)
    choices = []
    for row, floor, known, total in zip(scores, floors, raw, totals, strict=True):
        tokens = (row >= floor).nonzero()[:, 0]
        tokens = tokens[row[tokens].argsort(descending=True, stable=True)[:count]]
        named = list(zip(tokens.tolist(), (known[tokens] - total).tolist(), strict=True))
        choices.append(named if math.isfinite(total) else [])
    return choices
