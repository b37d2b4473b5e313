"""Jobs under a real Slurm, on four virtual nodes: however its ranks start, a short bench gives the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.mpiexec import command
from tests.cli.run import ROOT, pipeinfer
from tests.slurm.cluster import Cluster, cluster, missing

RANKS = 4
SHORT = ("--prompts", "1", "--repeats", "1", "--tokens", "32", "--policies", "plain,continuous", "--json")
JOB = ("bench", "real-builtin", *SHORT)
JOB_S = 300.0
OPEN_MPI, MPICH = ROOT / ".venv", ROOT / ".venv-mpich"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"needs Slurm and munge; not installed: {', '.join(missing())}"),
]


@pytest.fixture
def slurm() -> Iterator[Cluster]:
    """A new one for each test: a job that hangs would otherwise be in the way of all that follow."""
    with cluster(RANKS) as started:
        yield started


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The answer under plain mpiexec."""
    line, environ = command(RANKS, [sys.executable, "-m", "pipeinfer", *JOB])
    environ["PYTHONPATH"] = str(ROOT)
    return answer(subprocess.run(line, env=environ, capture_output=True, text=True, timeout=JOB_S, check=False))


def answer(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What the rows say of tokens, by policy and ranks."""
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert max(row["ranks"] for row in rows) == RANKS
    assert len({row["tokens_digest"] for row in rows}) == 1
    return {f"{row['policy']} on {row['ranks']}": (row["stages"], row["tokens_digest"]) for row in rows}


def having(venv: Path, make: str) -> Path:
    if not (venv / "bin/pipeinfer").exists():
        pytest.skip(f"needs {venv.name}: {make}")
    return venv


def script(slurm: Cluster, *options: str | Path, job: tuple[str, ...] = JOB) -> Path:
    """What ``pipeinfer slurm-script`` writes for ``job``, in a file."""
    file = slurm.place / "job.sbatch"
    asked = ("--nodes", str(RANKS), "--mem", "500M", "--time", "00:02:00", "--out", str(file))
    name, *arguments = job
    written = pipeinfer("slurm-script", name, *asked, *map(str, options), "--", *arguments)
    assert written.returncode == 0, written.stderr
    return file


def test_sbatch_with_open_mpis_mpirun(slurm: Cluster, expected: dict[str, Any]) -> None:
    venv = having(OPEN_MPI, "make venv")
    found = slurm.batch(script(slurm, "--venv", venv, "--launcher", "mpirun"), JOB_S)
    assert answer(found) == expected


def test_sbatch_with_srun_and_open_mpi(slurm: Cluster, expected: dict[str, Any]) -> None:
    venv = having(OPEN_MPI, "make venv")
    spoken = slurm.run("srun", "--mpi=pmix", "true", timeout_s=JOB_S)
    if "PMIx library" in spoken.stderr:
        pytest.skip("Slurm's PMIx plugin finds no libpmix.so, which Debian has in libpmix-dev")
    found = slurm.batch(script(slurm, "--venv", venv), JOB_S)
    assert answer(found) == expected


def test_srun_with_mpich(slurm: Cluster, expected: dict[str, Any]) -> None:
    venv = having(MPICH, "make MPI=mpich venv")
    ranks = ("srun", "--mpi=pmi2", f"--nodes={RANKS}", f"--ntasks={RANKS}")
    assert answer(slurm.run(*ranks, venv / "bin/pipeinfer", *JOB, timeout_s=JOB_S)) == expected


def test_srun_without_a_common_pmi_is_refused_once_and_the_job_fails(slurm: Cluster) -> None:
    """Each task would otherwise be a job of one, and all of them would decode the prompt."""
    venv = having(MPICH, "make MPI=mpich venv")
    found = slurm.batch(script(slurm, "--venv", venv, "--mpi", "none"), JOB_S)
    assert (found.returncode, found.stdout) == (2, "")
    (said,) = [line for line in found.stderr.splitlines() if line.startswith("pipeinfer: ")]
    assert "srun started 4 processes, but MPI sees 4 jobs of one" in said
    assert "--mpi=pmix" in said


def test_a_cluster_leaves_nothing_behind_even_of_a_job_that_runs() -> None:
    with cluster(1) as left:
        left.run("sbatch", "--wrap", "srun bash -c 'touch running && sleep 60'", timeout_s=JOB_S)
        left.wait((left.place / "running").exists, "running job", JOB_S)
        assert len(left.processes()) > 3, "three daemons and the job"
    assert left.processes() == []
    assert not left.place.exists()
