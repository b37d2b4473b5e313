"""What is asked of a shard after rows: kinds of choices that depend on a row's position and nothing else of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from pipeinfer.core.messages import NO_TOKEN
from pipeinfer.core.ports import GREEDY, Sampling, SamplingInputs

DRAWN = {"drawn": Sampling(0.8, seed=7), "drawn of few": Sampling(0.8, top_k=20, top_p=0.9, seed=3)}
MIXED = (
    GREEDY,
    Sampling(0.8, seed=7),
    Sampling(0.8, top_k=20, top_p=0.9, seed=3),
    Sampling(0.8, seed=2**63),
    Sampling(1.5, repetition_penalty=1.5, seed=5),
    Sampling(repetition_penalty=2.0),
    Sampling(0.8, top_k=20, top_p=0.9, seed=4),
    Sampling(0.25, min_p=0.125),
    Sampling(top_logprobs=5),
    Sampling(0.8, seed=9, top_logprobs=1),
    Sampling(0.8, top_k=20, top_logprobs=20, presence_penalty=0.5, frequency_penalty=0.25),
    Sampling(logit_bias=((3, 5.0), (7, -5.0), (400, 9.0))),
)
"""The samplings of rows in turn, by their positions."""


def mixed_draw(positions: Sequence[int], is_guess: bool = False) -> SamplingInputs:
    """A draw of tokens at ``positions``, each by a sampling that depends on its position."""
    samplings = tuple([MIXED[position % len(MIXED)] for position in positions])
    seen = tuple([np.arange(each) for each in positions])
    return SamplingInputs(samplings, np.array(positions), seen, is_guess, tuple([each % 7 for each in seen]))


def say(shard: Any, hidden: Tensor, rows: Sequence[int], positions: Sequence[int], kind: str) -> Any:
    """Choices of a ``kind``: the best token, eight, one that is drawn, by one sampling or by one of each row, guesses,
    or tokens that are given to some rows."""
    draw = SamplingInputs((DRAWN[kind],) * len(positions), np.array(positions)) if kind in DRAWN else None
    if kind in ("mixed", "guessed"):
        draw = mixed_draw(positions, kind == "guessed")
    if kind == "given":
        tops = tuple([Sampling(top_logprobs=position % 4) for position in positions])
        given = tuple([NO_TOKEN if position % 5 == 0 else 3 * position % 32 for position in positions])
        draw = SamplingInputs(tops, np.array(positions), given=given)
    return shard.sample(hidden, rows, 8 if kind == "eight" else 1, draw)


KINDS = ("best", "eight", *DRAWN, "mixed", "guessed", "given")
