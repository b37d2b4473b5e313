"""Tokens and their log-probabilities are those of plain decoding on one rank, bit by bit, in 16 bits too.

With PIPEINFER_MATRIX=full: all prompts of benchmarks/prompts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeinfer.core.ports import Sampling
from stages.kernels.library import library
from tests.mpi.matrix import FULL, RIVALS, TIMEOUT_S, Asked, Case, Task, decode, prompts_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(TIMEOUT_S),
    pytest.mark.skipif(library() is None, reason="without the kernels 16-bit rows depend on their company"),
]

PLAIN = Case(1, "plain")
CASES = [
    *(Case(ranks, "plain") for ranks in ((2, 3, 4) if FULL else (4,))),
    *(Case(ranks, settings=("govern=false",)) for ranks in (1, 2, 3, 4)),
    *(Case(ranks) for ranks in ((1, 2, 3, 4) if FULL else (3,))),
    *(Case(ranks, policy) for policy in RIVALS for ranks in ((1, 2, 3, 4) if FULL else (3,))),
    Case(3, settings=("govern=false", "prefill_chunk=5")),
]
COUNT = 24 if FULL else 12


def test_bits_are_those_of_plain_decoding(tmp_path: Path) -> None:
    prompts = prompts_for(PLAIN.target)[: 100 if FULL else 2]
    requests = [Asked(prompt, COUNT) for prompt in prompts]
    requests += [Asked(prompt, COUNT, Sampling(0.8, seed=seed)) for seed, prompt in enumerate(prompts)]
    in_turn = {dtype: CASES if FULL else CASES[first::2] for first, dtype in enumerate(("bf16", "fp32"))}
    cases = [[replace(case, dtype=dtype) for case in (PLAIN, *some)] for dtype, some in in_turn.items()]
    tasks: list[Task] = [(case, requests) for of_dtype in cases for case in of_dtype]
    answers = iter(decode(tasks, tmp_path))  # of one job
    for _, *others in cases:
        plain = next(answers)
        assert sum(map(len, plain.logprobs)) == len(requests) * COUNT
        for case in others:
            said = next(answers)
            assert said.tokens == plain.tokens, case
            assert said.logprobs == plain.logprobs, case
