"""Log-probabilities of a prompt's tokens are those that plain decoding gives these tokens one by one, bit by bit; and
those of transformers, up to rounding.

With PIPEINFER_MATRIX=full: more prompts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.core.ports import Sampling
from stages.kernels.library import library
from tests.mpi.matrix import FULL, TIMEOUT_S, Asked, Case, Task, decode, prompts_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(TIMEOUT_S),
    pytest.mark.skipif(library() is None, reason="without the kernels rows depend on their company"),
]

PLAIN = Case(1, "plain")
FREE = ("govern=false",)
CASES = [
    PLAIN,
    Case(1, settings=FREE),
    Case(2, "plain", settings=("prefill_chunk=1",)),
    Case(2, settings=(*FREE, "prefill_chunk=7")),
    Case(3, "pipeinfer"),
    Case(2, "plain", tp=2),
    Case(4, settings=(*FREE, "prefill_chunk=40"), tp=2),
]
COUNT, TOPS = 48, 3


def texts_of(dtypes: tuple[str, ...], where: Path) -> dict[str, tuple[list[tuple[int, ...]], Any]]:
    """By dtype: texts of which plain decoding said all but the first token, and what it said of them."""
    starts = [prompt[:1] for prompt in prompts_for(BUILTIN)[: 20 if FULL else 2]]
    requests = [Asked(start, COUNT, Sampling(top_logprobs=TOPS)) for start in starts]
    requests += [Asked(start, COUNT, Sampling(1.5, seed=7, top_logprobs=TOPS)) for start in starts]
    said = decode([(replace(PLAIN, dtype=dtype), requests) for dtype in dtypes], where)
    prompts = [asked.prompt for asked in requests]
    return {
        dtype: ([(*prompt, *tokens) for prompt, tokens in zip(prompts, one.tokens, strict=True)], one)
        for dtype, one in zip(dtypes, said, strict=True)
    }


def test_bits_are_those_of_decoding_token_by_token(tmp_path: Path) -> None:
    known = texts_of(("bf16", "fp32"), tmp_path)
    tasks: list[Task] = []
    for dtype, (texts, _) in known.items():
        requests = [Asked(text, 0, Sampling(prompt_logprobs=TOPS)) for text in texts]
        requests += [Asked(text, 3, Sampling(0.8, seed=3, prompt_logprobs=0)) for text in texts]
        some = CASES if FULL else CASES[dtype == "fp32" :: 2]  # in turn
        tasks += [(replace(case, dtype=dtype), requests) for case in some]
    for (case, _), said in zip(tasks, decode(tasks, tmp_path), strict=True):
        texts, plain = known[case.dtype]
        for index, text in enumerate(texts):
            (nothing, *logprobs), (none, *tops) = said.prompt_logprobs[index], said.prompt_top_logprobs[index]
            assert (nothing, none, said.tokens[index]) == (None, [], []), case
            assert logprobs == plain.logprobs[index], f"{case}, {text}"
            assert tops == plain.top_logprobs[index], f"{case}, {text}"
            again = len(texts) + index
            assert said.prompt_logprobs[again] == said.prompt_logprobs[index], case
            assert (said.prompt_top_logprobs[again], len(said.tokens[again])) == ([[]] * len(text), 3), case


def test_they_are_those_of_transformers(tmp_path: Path) -> None:
    ((texts, _),) = texts_of(("fp32",), tmp_path).values()
    requests = [Asked(text, 0, Sampling(prompt_logprobs=TOPS)) for text in texts]
    (said,) = decode([(Case(2, settings=FREE), requests)], tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(model_directory(BUILTIN, "target"), dtype=torch.float32)
    with torch.inference_mode():
        rows = model(torch.tensor(texts)).logits.log_softmax(-1)[:, :-1]  # [texts, tokens but the first, vocabulary]
    wanted = rows.gather(-1, torch.tensor(texts)[:, 1:, None])[:, :, 0]
    found = torch.tensor([logprobs[1:] for logprobs in said.prompt_logprobs])
    assert torch.allclose(found, wanted, atol=2e-4)
    best = torch.tensor([[[logp for _, logp in top] for top in tops[1:]] for tops in said.prompt_top_logprobs])
    assert torch.allclose(best, rows.topk(TOPS, -1).values, atol=2e-4)
