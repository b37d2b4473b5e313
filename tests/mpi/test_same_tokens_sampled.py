"""What is drawn depends on model, prompt, settings and seed alone: not on ranks, policy or timing. It is what
transformers would draw with the same noise."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from pipeinfer.core.config import BUILTIN
from pipeinfer.core.ports import Sampling
from tests.mpi.matrix import (
    ABLATIONS,
    FULL,
    RANKS,
    RIVALS,
    SYNCHRONOUS,
    TIMEOUT_S,
    Asked,
    Case,
    Task,
    clear_margins,
    decode,
    prompts_for,
    same,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT_S)]

NEW_TOKENS = 128 if FULL else 24
SEEDS = (*range(18 if FULL else 2), 2**63 + 5, 2**64 - 1)
PROCESSORS = (  # top_k, top_p, min_p, repetition_penalty
    (0, 1.0, 0.0, 1.0),
    (40, 1.0, 0.0, 1.0),
    (0, 0.9, 0.0, 1.0),
    (0, 1.0, 0.05, 1.0),
    (0, 1.0, 0.0, 1.3),
    (50, 0.95, 0.02, 1.1),
)
ALWAYS = ("govern=false",)  # many ranks on few cores would often decode plainly
MAIN = [*(Case(ranks, settings=ALWAYS) for ranks in (4, 1, 2)), *(Case(4, policy) for policy in ("plain", *RIVALS))]
ALL = 2  # of them take every request
POLICIES, COUNTS = ("plain", *RIVALS), (1, 2, 6)
ALL_OTHERS = [Case(ranks, policy) for policy in POLICIES for ranks in COUNTS]
OTHERS = ALL_OTHERS if FULL else [Case(2, RIVALS[0])]


def requests() -> list[Asked]:
    """Each seed at two temperatures, with changing processors; two seeds share a prompt."""
    found = []
    for index, (seed, temperature) in enumerate(product(SEEDS, (0.7, 1.0))):
        sampling = Sampling(temperature, *PROCESSORS[index % len(PROCESSORS)], seed=seed)
        found.append(Asked(prompts_for(BUILTIN)[index // 4], NEW_TOKENS, sampling))
    return found


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path: Path) -> None:
    every = requests()
    asked: list[Task] = [(case, every) for case in MAIN[:ALL]]
    asked += [(case, every if FULL else every[index::4]) for index, case in enumerate(MAIN[ALL:])]
    asked += [(case, every if FULL else every[index::8]) for index, case in enumerate(OTHERS)]
    if FULL:
        asked += [(Case(ranks, policy), every) for ranks in RANKS for policy in ABLATIONS]
    said = decode(asked, tmp_path)
    same(asked, said)
    assert clear_margins(asked)
    rounds = [answer for (case, _), answer in zip(asked, said, strict=True) if case.policy in SYNCHRONOUS]
    assert min(answer.accept_length for answer in rounds) > 1, "guesses were accepted"
    assert len(set(map(tuple, said[0].tokens))) > 0.9 * len(every), "other seeds and temperatures, other texts"
