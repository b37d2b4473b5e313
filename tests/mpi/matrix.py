"""Many engines on one MPI job, and what transformers says to the same requests: what the tests of equal tokens share.

With PIPEINFER_MATRIX=full in the environment they take all prompts, 128 tokens each and every configuration: hours.
Without, each kind of engine, model and draw has a few.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList

from launch.mpiexec import command
from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.core.ports import GREEDY, Sampling
from pipeinfer.core.sampling import exact
from pipeinfer.text import Text
from speculation.schedules.policy import POLICIES
from tests.models.test_sampling import Noise, theirs

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ("-m", "tests.mpi.programs.same_tokens")
FULL = os.environ.get("PIPEINFER_MATRIX") == "full"
NEW_TOKENS = 128 if FULL else 32
TIMEOUT_S = 12 * 3600 if FULL else 600
RANKS = (1, 2, 3, 4, 6)
SYNCHRONOUS = ("sync-chain", "sync-tree")
"""They wait for the draft. Whether others have a guess in time depends on how busy the machine is."""
RIVALS = (*SYNCHRONOUS, "pipeinfer")
ABLATIONS = ("no-cancel", "no-tree", "one-run", "no-reuse")
LEAST_MARGIN = 5e-6  # of a logit: what rounding never reaches
MOST_SHOWN = 10  # differences


@dataclass(frozen=True, slots=True)
class Case:
    """An engine on the first ``ranks`` ranks of a job; ``policy`` is built in or in benchmarks/baselines."""

    ranks: int
    policy: str = "continuous"
    settings: tuple[str, ...] = ()
    target: str = BUILTIN
    draft: str | tuple[str, ...] = BUILTIN
    drafters: int | None = None
    dtype: str = "fp32"
    tp: int = 1
    fused: str = "auto"

    def words(self) -> dict[str, Any]:
        """The engine's keywords."""
        found = {name: value for name, value in asdict(self).items() if name != "ranks"}
        if self.policy not in POLICIES:
            found["policy"] = str(ROOT / "benchmarks/baselines" / f"{self.policy}.toml")
        return found

    def __str__(self) -> str:
        usual = {field.name: field.default for field in fields(self)}
        words = [f"{name}={value!r}" for name, value in asdict(self).items() if value != usual[name]]
        return f"Case({', '.join(words)})"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request."""

    prompt: tuple[int, ...]
    max_new_tokens: int = NEW_TOKENS
    sampling: Sampling = GREEDY
    ignore_eos: bool = True


@dataclass(frozen=True, slots=True)
class Wanted:
    """What transformers says. ``margins``: by how much it prefers each token to the second best."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Said:
    """What an engine said to each request, and what all of them cost: runs, accepted tokens per correction. The names
    of lists are those of Completion."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    top_logprobs: list[list[list[Any]]]
    prompt_logprobs: list[list[float | None]]
    prompt_top_logprobs: list[list[list[Any]]]
    runs: int
    cancelled_runs: int
    accept_length: float


Task = tuple[Case, Sequence[Asked]]


@cache
def prompts_for(target: str) -> tuple[tuple[int, ...], ...]:
    """The tokens of benchmarks/prompts by the target's tokenizer."""
    lines = (ROOT / "benchmarks/prompts/python.jsonl").read_text().splitlines()
    text = Text(model_directory(target, "target"))
    return tuple(tuple(text.encode(json.loads(line)["prompt"])) for line in lines)


def decode(tasks: Sequence[Task], directory: Path, python: str = sys.executable) -> list[Said]:
    """What each task's engine says, on one job of real ranks under the MPI of ``python``."""
    order, answers = directory / "order.json", directory / "answers.jsonl"
    answers.write_text("")
    words = [
        {"ranks": case.ranks, "engine": case.words(), "requests": [asdict(asked) for asked in requests]}
        for case, requests in tasks
    ]
    order.write_text(json.dumps({"tasks": words, "answers": str(answers)}))
    line, environ = command(max(case.ranks for case, _ in tasks), [python, *PROGRAM, str(order)], python)
    environ["PYTHONPATH"] = str(ROOT)
    try:
        result = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=0.9 * TIMEOUT_S, check=False)
        problem = result.stderr if result.returncode else ""
    except subprocess.TimeoutExpired as error:
        problem = f"{error}"
    found = [Said(**json.loads(said)) for said in answers.read_text().splitlines()]
    assert not problem and len(found) == len(tasks), f"{tasks[min(len(found), len(tasks) - 1)][0]}: {problem}"
    return found


def same(tasks: Sequence[Task], said: Sequence[Said]) -> None:
    """Engines said what transformers says; where they did not, all it takes to see it again is told."""
    wrong, tokens = [], 0
    for (case, requests), answer in zip(tasks, said, strict=True):
        for asked, text, found in zip(requests, wanted(case.target, requests), answer.tokens, strict=True):
            tokens += len(found)
            if tuple(found) != text.tokens:
                wrong.append(f"{case}, {asked}: {_first_difference(text, found)}")
    print(f"{tokens} tokens of {len(tasks)} engines, {sum(answer.runs for answer in said)} runs")
    assert not wrong, "\n".join([f"{len(wrong)} texts differ", *wrong[:MOST_SHOWN]])


def _first_difference(text: Wanted, found: Sequence[int]) -> str:
    for index, (right, token) in enumerate(zip(text.tokens, found, strict=False)):
        if right != token:
            return f"token {index} is {token}; transformers says {right}, by {text.margins[index]:.2g} of a logit"
    return f"{len(found)} tokens; transformers says {len(text.tokens)}"


_known: dict[tuple[str, Asked], Wanted] = {}


def wanted(target: str, requests: Sequence[Asked]) -> list[Wanted]:
    """What transformers' ``generate`` says to each request. Where prompts are equally long it takes them together."""
    new = sorted({asked for asked in requests if (target, asked) not in _known}, key=_shape)
    if new:
        model: Any = AutoModelForCausalLM.from_pretrained(model_directory(target, "target"), dtype=torch.float32)
        ends = model.generation_config.eos_token_id
        for _, group in groupby(new, _shape):
            batch = list(group)
            model.generation_config.eos_token_id = None if batch[0].ignore_eos else ends
            _known.update(((target, asked), text) for asked, text in zip(batch, _generate(model, batch), strict=True))
    return [_known[target, asked] for asked in requests]


def _shape(asked: Asked) -> tuple[Any, ...]:
    """Equal for requests that ``generate`` can take together: noise is one request's own."""
    alone = (0, ()) if asked.sampling == GREEDY else (asked.sampling.seed, asked.prompt, str(asked.sampling))
    return len(asked.prompt), asked.max_new_tokens, asked.ignore_eos, alone


def _generate(model: Any, batch: Sequence[Asked]) -> list[Wanted]:
    prompts = torch.tensor([asked.prompt for asked in batch])
    processors, sampling = LogitsProcessorList(), exact(batch[0].sampling)
    if sampling != GREEDY:
        assert sampling.temperature > 0, "a greedy choice has no noise"
        processors = theirs(sampling)
        processors.append(Noise(sampling.seed))
    out = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=batch[0].max_new_tokens,
        pad_token_id=0, logits_processor=processors, output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    best = torch.stack(out.scores, 1).topk(2).values  # [requests, tokens, 2]
    margins = (best[..., 0] - best[..., 1]).tolist()
    ends = model.generation_config.eos_token_id
    stops = [] if ends is None else ends if isinstance(ends, list) else [ends]
    found = []
    for tokens, margin in zip(out.sequences[:, prompts.shape[1] :].tolist(), margins, strict=True):
        count = next((index + 1 for index, token in enumerate(tokens) if token in stops), len(tokens))
        found.append(Wanted(tuple(tokens[:count]), tuple(margin[:count])))
    return found


def clear_margins(tasks: Sequence[Task]) -> bool:
    """Whether no token of the tasks' texts hangs on rounding, so that any right kernel must say the same."""
    texts = [text for case, requests in tasks for text in wanted(case.target, requests)]
    least = min(margin for text in texts for margin in text.margins)
    print(f"the closest of transformers' choices was clear by {least:.2g} of a logit")
    return least > LEAST_MARGIN
