"""Whole programs under mpiexec: how jobs fail, and that every way to start one gives the same tokens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.mpiexec import command
from tests.cli.run import here

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "def read_lines(path):\n"

pytestmark = pytest.mark.slow


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def under_mpiexec(ranks: int, *program: str, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    line, environ = command(ranks, [sys.executable, *program])
    environ["PYTHONPATH"] = str(ROOT)
    return subprocess.run(line, env=environ, capture_output=True, text=True, timeout=timeout_s, check=False)


def pipeinfer(*arguments: str, timeout_s: float = 300.0, **more: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "pipeinfer", *arguments]
    return subprocess.run(
        line, env=environment(**more), capture_output=True, text=True, timeout=timeout_s, check=False, cwd=ROOT
    )


def answer(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_rank_that_raises_takes_all_down_and_says_who_and_why_once() -> None:
    result = under_mpiexec(4, "-m", "tests.mpi.programs.failing", "raise")
    assert result.returncode != 0
    assert result.stderr.count("Traceback") == 1
    assert result.stderr.count("RuntimeError: the tenth pass fails") == 1
    assert "pipeinfer: rank 2 on " in result.stderr


def test_a_hang_explains_itself() -> None:
    result = under_mpiexec(4, "-m", "tests.mpi.programs.failing", "swallow")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    said = result.stderr
    assert "nothing has moved for 5 s" in said
    assert "--timeout" in said
    assert "in flight" in said
    for role in ("orchestrator:", "stage 0: run", "stage 1: run", "stage 2: run", "drafter 0: run"):
        assert role in said


def test_mpirun_and_ranks_agree_and_weights_are_split_and_not_repeated() -> None:
    arguments = ("run", "--prompt", PROMPT, "--max-new-tokens", "48", "--json")
    given = answer(under_mpiexec(3, "-m", "pipeinfer", *arguments))
    started = answer(pipeinfer(*arguments, "--ranks", "3"))
    alone = answer(here(*arguments, "--ranks", "1", "--policy", "plain"))
    assert given["tokens"] == started["tokens"] == alone["tokens"]
    assert given["text"] == started["text"] == alone["text"]
    assert [rank["roles"] for rank in given["ranks"]] == [rank["roles"] for rank in started["ranks"]]
    (all_bytes,) = [rank["weight_nbytes"] for rank in alone["ranks"]]
    parts = [rank["weight_nbytes"] for rank in started["ranks"] if rank["layers"]]
    config = json.loads((ROOT / "pipeinfer/builtin/target/config.json").read_text())
    embedding = config["vocab_size"] * config["hidden_size"]
    embedding *= 4 if alone["config"]["dtype"] == "fp32" else 2  # tied: first and last stage both hold it
    assert sum(parts) == all_bytes + embedding
    assert max(parts) < all_bytes


def test_a_refusal_under_mpiexec_is_one_line_from_one_rank() -> None:
    result = under_mpiexec(3, "-m", "pipeinfer", "run", "--prompt", "")
    assert result.returncode == 2
    ours = [line for line in result.stderr.splitlines() if line.startswith("pipeinfer:")]
    assert ours == ["pipeinfer: the prompt is empty; give at least one token of text"]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_singletons_under_a_launcher_that_meant_one_job_are_refused() -> None:
    """What srun without an MPI plugin gives: four processes that each believe to be alone."""
    srun = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    results = [pipeinfer("run", "--prompt", "x", **srun, SLURM_PROCID=str(rank)) for rank in (0, 3)]
    assert [result.returncode for result in results] == [2, 2]
    assert results[0].stderr.count("\n") == 1
    assert "srun --mpi=pmix" in results[0].stderr
    assert results[1].stderr == ""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ending_it_leaves_no_rank_behind(sign: signal.Signals) -> None:
    line = [sys.executable, "-m", "pipeinfer", "run", "--ranks", "2", "--prompt", PROMPT, "--max-new-tokens", "900",
            "--ignore-eos"]  # fmt: skip
    mark = f"mark-{os.getpid()}-{sign}"
    with subprocess.Popen(
        line, env=environment(PIPEINFER_TEST=mark), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.read(20)  # the ranks are up and decoding
        process.send_signal(sign)
        assert process.wait(300) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[sign]
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()  # which ends when the last rank is gone
    while _processes_with(mark):  # its hang is the test's
        os.sched_yield()


def _processes_with(mark: str) -> list[str]:
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in environ.read_bytes():
                found.append(environ.parent.name)
        except OSError:
            continue  # it has just ended, or is not ours
    return found
