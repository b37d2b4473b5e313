"""The product: on any number of ranks, under any policy and with either MPI, the tokens are those of transformers.

Greedy, fp32, the built-in pair. Other models are in test_same_tokens_of_architectures.py, drawn tokens in
test_same_tokens_sampled.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.core.ports import Sampling
from tests.models.tiny import make_tiny_pair
from tests.mpi.matrix import (
    ABLATIONS,
    FULL,
    NEW_TOKENS,
    RANKS,
    RIVALS,
    ROOT,
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

DEFAULT = Case(4)
ALWAYS = ("govern=false",)
"""Speculates whatever that costs: many ranks on few cores would often decode plainly."""
ALWAYS_RIGHT = str(model_directory(BUILTIN, "target"))
CASES = [
    *(Case(ranks, settings=ALWAYS) for ranks in RANKS),
    *(Case(4, policy) for policy in ("plain", *RIVALS)),
    *(Case(4, policy, ALWAYS) for policy in ABLATIONS),
    Case(4, settings=ALWAYS, drafters=2),
    Case(6, settings=ALWAYS, draft=(BUILTIN, ALWAYS_RIGHT)),
    Case(3, settings=ALWAYS, draft=ALWAYS_RIGHT),
    Case(4, settings=ALWAYS, draft="none"),
    Case(4, settings=(*ALWAYS, "cancel=relay")),
    Case(2, settings=(*ALWAYS, "prefill_chunk=7", "window=1", "max_rows=3")),
]
MANY, SOME = 8, 1  # prompts
LONG = Asked(sum(prompts_for(BUILTIN)[:9], ()))  # longer than the runs of prompt tokens


def tasks() -> list[Task]:
    """The default takes many prompts; each other engine takes some, the next one the next ones."""
    prompts = [Asked(prompt) for prompt in prompts_for(BUILTIN)]
    if FULL:
        usual = [case for case in CASES if case.draft == BUILTIN and case.drafters is None]
        others = [replace(case, ranks=ranks) for case in usual for ranks in RANKS]
        cases = dict.fromkeys([DEFAULT, *CASES, *others])
        return [(case, [*prompts, LONG]) for case in cases]
    found: list[Task] = [(DEFAULT, [*prompts[:MANY], LONG])]
    for index, case in enumerate(CASES):
        long = [LONG] if index % 3 == 0 else []
        found.append((case, [*(prompts * 2)[index * SOME % 100 :][:SOME], *long]))
    return found


def test_every_rank_count_and_policy_says_what_transformers_says(tmp_path: Path) -> None:
    asked = tasks()
    assert {requests[0].max_new_tokens for _, requests in asked} == {NEW_TOKENS}
    said = decode(asked, tmp_path)
    same(asked, said)
    assert clear_margins(asked)
    for (case, _), answer in zip(asked, said, strict=True):
        print(f"{answer.runs} runs, {answer.cancelled_runs} cancelled, {answer.accept_length:.2f} tokens each: {case}")
        is_right = case.policy != "plain" if answer.accept_length > 1 else case.policy not in SYNCHRONOUS
        assert is_right, f"{case} was not what it is called"
    assert sum(answer.cancelled_runs for answer in said) > len(said)


@pytest.fixture(scope="module")
def mpich_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with the packages of this one, but with MPICH as its MPI."""
    place = tmp_path_factory.mktemp("mpich")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True, timeout=300)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed", "--prefix", str(place)]
    got = subprocess.run(
        [*install, "-c", str(ROOT / "constraints.txt"), "mpich"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if got.returncode:
        pytest.skip(f"the mpich wheel cannot be had here: {got.stderr.strip().splitlines()[-1]}")
    return str(place / "bin" / "python")


def test_under_mpich_they_are_the_same(mpich_python: str, tmp_path: Path) -> None:
    told = subprocess.run(
        [mpich_python, "-c", "from mpi4py import MPI; print(MPI.get_vendor()[0])"],
        capture_output=True, text=True, timeout=300, check=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert told.stdout.strip() == "MPICH"
    target, draft = map(str, make_tiny_pair(tmp_path, "Qwen3ForCausalLM", seed=1))
    asked: list[Task] = []
    for model in ((BUILTIN, BUILTIN), (target, draft)):
        requests = [Asked(prompt[:60], NEW_TOKENS) for prompt in prompts_for(model[0])[: 4 if FULL else 2]]
        requests.append(replace(requests[0], sampling=Sampling(0.9, 40, 0.95, 0.01, 1.1, seed=7)))
        for ranks, policy in ((3, "continuous"), (4, "continuous"), (4, "plain")) if FULL else ((3, "continuous"),):
            asked.append((Case(ranks, policy, (), *model), requests))
    same(asked, decode(asked, tmp_path, mpich_python))
