"""Stages that several ranks share: the bits of one rank, over real ranks, windows and collectives, on more ranks than
cores; a rank that stops or dies ends the job by name.

With PIPEINFER_MATRIX=full: more prompts and every policy on every group."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeinfer.core.ports import Sampling
from stages.kernels.library import library
from tests.faults.matrix import ROOT, end
from tests.faults.matrix import Case as Fault
from tests.models.tiny import make_tiny_pair
from tests.models.tiny_generic import make_pair
from tests.mpi.matrix import FULL, RIVALS, TIMEOUT_S, Asked, Case, Task, decode, prompts_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(TIMEOUT_S),
    pytest.mark.skipif(library() is None, reason="groups compute on the kernels"),
]

COUNT = 12
FREE = ("govern=false",)
MPICH = ROOT / ".venv-mpich" / "bin" / "python"
POLICIES = (*((policy, ()) for policy in ("plain", *RIVALS)), ("continuous", FREE))
BF16 = [
    Case(2, tp=2, settings=FREE, fused="on"),  # one group, which drafts as well
    Case(3, tp=2, settings=FREE),  # a drafter of its own
    Case(4, "sync-tree", tp=2),  # two groups, the first drafts as well
    Case(4, "plain", tp=4, fused="off"),
    *([Case(8, tp=8, settings=FREE)] if FULL else []),
]
FP32 = [Case(2, "pipeinfer", tp=2), Case(2, tp=2, settings=FREE, fused="off"), Case(4, tp=4, settings=FREE)]


def tasks_of(cases: Sequence[Case], dtype: str) -> list[Task]:
    """Plain decoding on one rank, then all ``cases``, of one target."""
    prompts = prompts_for(cases[0].target)[: 20 if FULL else 1]
    requests = [Asked(prompt, COUNT) for prompt in prompts]
    requests += [Asked(prompt, COUNT, Sampling(0.8, seed=seed)) for seed, prompt in enumerate(prompts)]
    requests += [Asked(prompts[0], 4, Sampling(0.7, top_p=0.9, seed=3))]
    plain = Case(1, "plain", target=cases[0].target)
    return [(replace(case, dtype=dtype), requests) for case in (plain, *cases)]


def check(groups: Sequence[list[Task]], where: Path, python: str = sys.executable) -> None:
    """In one job: tokens and log-probabilities of all tasks of a group are those of its first."""
    answers = iter(decode([task for tasks in groups for task in tasks], where, python))
    for _, *others in groups:
        truth = next(answers)
        for case, _ in others:
            said = next(answers)
            assert said.tokens == truth.tokens, case
            assert said.logprobs == truth.logprobs, case


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_bits_are_those_of_one_rank(dtype: str, tmp_path: Path) -> None:
    """With MPICH in fp32, if there is an environment with it."""
    cases = BF16 if dtype == "bf16" else FP32
    if FULL:
        cases = [Case(8, policy, settings, tp=tp) for tp in (2, 4, 8) for policy, settings in POLICIES] + cases
    has_mpich = dtype == "fp32" and MPICH.exists()
    check([tasks_of(cases, dtype)], tmp_path, str(MPICH) if has_mpich else sys.executable)


def test_a_draft_that_can_be_split_is_and_experts_are_spread(tmp_path: Path) -> None:
    pairs = make_tiny_pair(tmp_path / "llama", "LlamaForCausalLM"), make_pair(tmp_path / "mixtral", "mixtral")
    cases = [Case(2, tp=2, settings=FREE, target=str(target), draft=str(draft)) for target, draft in pairs]
    check([tasks_of([case], dtype) for case, dtype in zip(cases, ("bf16", "fp32"), strict=True)], tmp_path)


@pytest.mark.parametrize("kind", ["exception", "sigterm"])
def test_a_rank_that_follows_and_fails_ends_the_job(kind: str) -> None:
    fault = Fault("run", "spawned" if kind == "exception" else "mpirun", 1, "following", kind)
    ending = end(fault, more=("--tp", "2", "--policy", "plain"))
    assert not ending.fault(fault), ending.said


@pytest.mark.parametrize("fused", ["on", "off"])
def test_a_rank_that_follows_and_is_stopped_is_named(fused: str) -> None:
    fault = Fault("run", "mpirun", 1, "following", "freeze")
    ending = end(fault, more=("--tp", "2", "--policy", "plain", "--fused", fused, "--timeout", "8"))
    assert ending.code == 3, ending.said
    assert [line for line in ending.ours if "rank 0 waited 8 s for rank 1 of its group" in line], ending.said
