"""From logits to the best tokens, the same for every shard."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeinfer.ports import Choice


def best_choices(logits: Tensor, count: int) -> list[list[Choice]]:
    """The ``count`` best tokens of each row of ``logits`` (float32 [rows, vocabulary]) with their log-probabilities,
    best first; of equal ones the lowest token, as argmax has it."""
    totals = torch.logsumexp(logits, -1, keepdim=True)
    if count == 1:
        best = logits.argmax(-1, keepdim=True)
        logps = logits.gather(-1, best) - totals
        return [[choice] for choice in zip(best[:, 0].tolist(), logps[:, 0].tolist(), strict=True)]
    # topk leaves open which of equal logits it takes and in what order; only its lowest value is used.
    count = min(count, logits.shape[-1])
    floors = logits.topk(count, -1).values[:, -1:]
    choices = []
    for row, floor, total in zip(logits, floors, totals, strict=True):
        tokens = (row >= floor).nonzero()[:, 0]
        tokens = tokens[row[tokens].argsort(descending=True, stable=True)[:count]]
        choices.append(list(zip(tokens.tolist(), (row[tokens] - total).tolist(), strict=True)))
    return choices
