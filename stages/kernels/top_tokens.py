"""From logits to the best tokens, the same for every shard, target or draft."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pipeinfer.core.ports import SampledToken, SamplingInputs
from stages.kernels.sampling import alike, changes_nothing, drawing_scores


def top_tokens(
    logits: Tensor, count: int, draw: SamplingInputs | None = None, log_totals: Tensor | None = None
) -> list[list[SampledToken]]:
    """The ``count`` best tokens of each row of ``logits`` (float32 [rows, vocabulary]) with their log-probabilities,
    best first; of equal ones the lowest token, as argmax has it. None of a row whose logits are not finite.

    With a ``draw`` they are ordered by the scores that decide it, so that the first is the token that is drawn; tokens
    that cannot be drawn are left out, even if fewer remain. The log-probabilities are those of ``logits`` all the same,
    but for a guess those of the deciding scores. See ShardModel.sample. ``log_totals``: float32 [rows, 1], logsumexp of
    the logits where it is known.

    Each row is drawn by its own sampling. Rows whose samplings are alike are processed together, and no row's numbers
    depend on the others. A token that the draw gives is the only choice of its row. Behind the choices come those of
    ``add_tops``."""
    if log_totals is None and not (draw and draw.is_guess):
        log_totals = _log_totals(logits)
    groups = [] if draw is None else alike(draw)
    if draw is None or len(groups) == 1:
        choices = _of_alike(logits, count, draw, log_totals)
    else:
        choices = [[] for _ in logits]
        for rows in groups:
            totals = None if log_totals is None else log_totals[rows]
            for row, found in zip(rows, _of_alike(logits[rows], count, draw.of(rows), totals), strict=True):
                choices[row] = found
    if draw is not None and not draw.is_guess and log_totals is not None:
        _take_given(choices, logits, draw, log_totals)
        add_tops(choices, range(len(choices)), logits, draw, log_totals)
    return choices


def _take_given(choices: list[list[SampledToken]], logits: Tensor, draw: SamplingInputs, log_totals: Tensor) -> None:
    """Put the tokens that ``draw`` gives in the place of the choices of their rows."""
    rows = [row for row in range(len(choices)) if draw.gives(row)]
    if rows:
        tokens = [draw.given[row] for row in rows]
        logps = logits[rows, tokens] - log_totals[rows, 0]
        for row, token, logp, total in zip(rows, tokens, logps.tolist(), log_totals[rows, 0].tolist(), strict=True):
            choices[row] = [(token, logp)] if math.isfinite(total) else []


def add_tops(
    choices: list[list[SampledToken]], rows: Iterable[int], logits: Tensor, draw: SamplingInputs, log_totals: Tensor
) -> None:
    """Put behind the choices of each of ``rows`` the most probable tokens by its ``logits``, as many as its sampling
    says; see ShardModel.sample. None are put where there is no choice."""
    wanted: dict[int, list[int]] = {}
    for row in rows:
        if draw.samplings[row].top_logprobs and choices[row]:
            wanted.setdefault(draw.samplings[row].top_logprobs, []).append(row)
    for count, some in wanted.items():
        known = logits[some]
        for row, tops in zip(some, _ranked(known, count, known, log_totals[some]), strict=True):
            choices[row] += tops


def _of_alike(
    logits: Tensor, count: int, draw: SamplingInputs | None, log_totals: Tensor | None
) -> list[list[SampledToken]]:
    """The same for rows that are alike."""
    if draw is None or changes_nothing(draw.samplings[0]):
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
        totals = _log_totals(raw)
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


def _log_totals(raw: Tensor) -> Tensor:
    """The logsumexp of each row, [rows, 1]: row by row on a processor, where torch may add up a long row in another
    order if it is alone."""
    if raw.is_cuda or len(raw) < 2:
        return torch.logsumexp(raw, -1, keepdim=True)
    return torch.stack([torch.logsumexp(row, -1, keepdim=True) for row in raw])
