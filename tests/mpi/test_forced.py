"""Forced acceptance in whole jobs: plain decoding's tokens on any ranks, and guesses as good as they were told to
be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.mpiexec import command
from pipeinfer import Engine, Sampling
from speculation.schedules.policy import CONTINUOUS
from tests.cli.run import ROOT, here

pytestmark = pytest.mark.slow

PROMPT = "def read_lines(path):\n"
COUNT = 48


@pytest.mark.parametrize("policy", ["continuous", str(ROOT / "benchmarks/baselines/sync-tree.toml")])
def test_tokens_are_those_of_plain_decoding_under_the_same_forcing(policy: str) -> None:
    forced = [0.7, 0.1]
    with (
        Engine(ranks=2, policy=policy, forced_acceptance=forced) as engine,
        Engine(forced_acceptance=forced, random_weights=True) as others,
    ):
        assert engine is not None and others is not None
        for sampling in (Sampling(), Sampling(0.8, repetition_penalty=1.1, seed=3)):
            answer = engine.generate(PROMPT, COUNT, sampling=sampling)
            assert answer.meaningless
            assert len(answer.tokens) == COUNT
            assert answer.tokens == engine.decode_alone(answer.prompt_tokens, COUNT, sampling=sampling)
            assert answer.tokens == others.generate(PROMPT, COUNT, sampling=sampling).tokens, "whatever the weights"


@pytest.mark.parametrize(("acceptance", "least", "most"), [(1, 0.85, 1.0), (0, 0.0, 0.0)])
def test_a_job_accepts_what_it_is_told_to(acceptance: int, least: float, most: float) -> None:
    settings = ["prompt_lookup=0", "govern=false"]  # the governor may find plain decoding faster
    with Engine(ranks=2, settings=settings, forced_acceptance=acceptance) as engine:
        assert engine is not None
        metrics = engine.generate(PROMPT, COUNT).metrics
    assert least <= metrics["acceptance_rate"] <= most
    assert metrics["runs"] >= COUNT / CONTINUOUS.max_rows, "a run accepts no more than it carries"


def test_a_job_under_mpirun_says_the_same_and_its_trace_replays(tmp_path: Path) -> None:
    words = ["run", "--prompt", PROMPT, "--max-new-tokens", str(COUNT), "--forced-acceptance", "0.8", "--json"]
    program = [sys.executable, "-m", "pipeinfer", *words, "--random-weights", "--trace", str(tmp_path / "trace")]
    line, environ = command(3, program)
    done = subprocess.run(line, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == json.loads(here(*words).stdout)["tokens"]
    replayed = here("replay", str(tmp_path / "trace"))
    assert replayed.returncode == 0, replayed.stderr
    assert replayed.stdout.count("commands identical") == 3
