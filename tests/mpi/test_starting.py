"""Ranks that never come out of MPI's start: the job ends with one message, and no rank outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.matrix import PLANTED, ROOT

pytestmark = pytest.mark.slow
MOST_S = 120.0


def start(place: Path, timeout_s: float) -> subprocess.Popen[str]:
    """A job of two ranks that spin inside MPI from the beginning."""
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(PLANTED), str(ROOT)]),
        "PIPEINFER_FAULT": "all,inside MPI,spin",
        "PIPEINFER_FAULT_AT": str(place / "at"),
    }
    line = [
        sys.executable,
        "-m",
        "pipeinfer",
        "run",
        "--prompt",
        "import",
        "--ranks",
        "2",
        "--timeout",
        f"{timeout_s:g}",
    ]
    return subprocess.Popen(line, env=environ, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def workers(parent: int) -> set[int]:
    """The ranks of the job that process ``parent`` started: below the launcher that it started."""
    found, below = set[int](), {parent}
    for _ in range(3):
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, rest = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()
                if int(rest[1]) in below and pid not in below:
                    below.add(pid)
                    if b"launch.worker" in (stat.parent / "cmdline").read_bytes().split(b"mpiexec")[-1]:
                        found.add(pid)
            except (OSError, ValueError):
                continue  # it has just ended
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: object, what: str) -> None:
    """Look until ``condition`` holds; fail after MOST_S."""
    assert callable(condition)
    deadline = time.monotonic() + MOST_S
    while not condition():
        assert time.monotonic() < deadline, what
        os.sched_yield()


def test_ranks_that_wait_for_each_other_inside_mpi_are_a_stall(tmp_path: Path) -> None:
    job = start(tmp_path, 3)
    _, said = job.communicate(timeout=MOST_S)
    ours = [line for line in said.splitlines() if line.startswith("pipeinfer: ")]
    assert len(ours) == 1, said
    assert "no progress for 3 s" in ours[0]
    assert ours[0].count("starting MPI") == 2
    assert job.returncode == 3


def test_no_rank_outlives_its_parent_even_inside_mpi(tmp_path: Path) -> None:
    job = start(tmp_path, 0)
    until((tmp_path / "at").exists, "no rank has reached MPI")
    ranks = workers(job.pid)
    assert ranks
    job.send_signal(signal.SIGKILL)
    job.communicate()
    until(lambda: not any(map(alive, ranks)), f"ranks {ranks} outlive their parent")
