"""On several ranks a random tiny model of every architecture says what transformers says.

The Llama family, Mixtral and Qwen3-MoE have layers of their own here, all others go through transformers' layers on our
slots.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeinfer.core.ports import Sampling
from tests.models import tiny_generic
from tests.models.tiny import CONFIGS, make_tiny_pair
from tests.mpi.matrix import (
    ABLATIONS,
    FULL,
    RIVALS,
    TIMEOUT_S,
    Asked,
    Case,
    Task,
    clear_margins,
    decode,
    prompts_for,
    same,
    wanted,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(TIMEOUT_S)]

GENERIC = ("gpt2", "falcon", "gemma", "gemma2", "gemma3", "phi3", "mixtral", "olmo", "qwen3_moe")
NEW_TOKENS = 128 if FULL else 24
LENGTHS = (9, 18, 27, 40)  # of prompts: few, so that transformers takes many at once
DRAWN = Sampling(0.8, 50, 0.95, 0.01, 1.1, seed=2**63 + 5)
WIDE = "govern=false"  # or guesses, which save nothing in models as small as these, would soon be given up
MOST = 4 if FULL else 3
"""Ranks: each of them imports transformers, which takes longer than all else."""
OTHERS = (  # than `continuous` on 3 ranks: each architecture takes the next one
    *(Case(MOST, policy, (WIDE,)) for policy in ("plain", *RIVALS, *ABLATIONS)),
    Case(1, settings=(WIDE,)),
    Case(2, settings=(WIDE,)),
    Case(MOST, settings=(WIDE, "cancel=relay")),
    Case(MOST, settings=(WIDE,), drafters=2),
    Case(MOST, draft="none"),
)


def make(directory: Path, name: str) -> tuple[str, str]:
    if name in CONFIGS:
        target, draft = make_tiny_pair(directory, name, seed=1)
    else:
        target, draft = tiny_generic.make_pair(directory, name)
    return str(target), str(draft)


def requests_for(target: str, count: int) -> list[Asked]:
    prompts = prompts_for(target)[:count]
    return [Asked(prompt[: LENGTHS[index % 4]], NEW_TOKENS) for index, prompt in enumerate(prompts)]


def tasks_for(target: str, draft: str, index: int) -> list[Task]:
    def of(case: Case) -> Case:
        return replace(case, target=target, draft=case.draft if case.draft == "none" else draft)

    """Of the ``index``-th architecture. Without FULL those of transformers' layers take ``continuous`` or another
    policy, in turn; test_generic_shard.py has three prompts of each of them on three shards."""
    requests = requests_for(target, 20 if FULL else 4)
    drawn = replace(requests[0], sampling=DRAWN)
    is_generic = not FULL and index >= len(CONFIGS)
    if is_generic:
        requests = requests[index % 2 :: 2]
    usual, always_right = Case(3, settings=(WIDE,)), Case(3, settings=(WIDE,), target=target, draft=target)
    if FULL:
        return [(case, [*requests, drawn]) for case in (always_right, of(usual), *map(of, OTHERS))]
    other = OTHERS[index % len(OTHERS)]
    if is_generic:
        case = usual if index % 3 == 1 else always_right if index % 3 == 2 else other
        return [(case if case is always_right else of(case), [*requests, drawn])]
    found = [(of(usual), requests), (of(other), [*requests[4:], drawn])]
    return [*found, (always_right, requests[:1])] if index % 3 == 0 else found


def test_every_architecture_says_what_transformers_says(tmp_path: Path) -> None:
    asked: list[Task] = []
    for index, name in enumerate((*CONFIGS, *GENERIC)):
        asked += tasks_for(*make(tmp_path / name, name), index)
    said = decode(asked, tmp_path)
    same(asked, said)
    for case, requests in asked:
        texts = [set(text.tokens) for text in wanted(case.target, requests)]
        assert sum(map(len, texts)) > 10 * len(texts), "texts that loop would hide errors"
    assert clear_margins(asked)
    for (case, _), answer in zip(asked, said, strict=True):
        print(f"{answer.runs} runs, {answer.cancelled_runs} cancelled, {answer.accept_length:.2f} tokens each: {case}")


def test_a_text_ends_where_transformers_ends_it(tmp_path: Path) -> None:
    """Thirty tokens of the vocabulary end a text, so that runs are in flight behind most ends."""
    target, draft = map(str, make_tiny_pair(tmp_path, "LlamaForCausalLM", seed=1, eos_token_id=list(range(0, 512, 17))))
    requests = [replace(one, ignore_eos=False) for one in requests_for(target, 100 if FULL else 12)]
    requests.append(replace(requests[0], sampling=DRAWN))
    asked: list[Task] = [
        (Case(ranks, policy, (WIDE,), target, draft), requests)
        for ranks, policy in ((3, "continuous"), (3, "pipeinfer"), (3, "sync-tree"))
    ]
    said = decode(asked, tmp_path)
    same(asked, said)
    assert clear_margins(asked)
    assert len({len(tokens) for tokens in said[0].tokens}) > 6, "at many different places"
