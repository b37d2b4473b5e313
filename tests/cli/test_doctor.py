"""`pipeinfer doctor`: what it says, what it measures, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipeinfer import __version__
from pipeinfer.bench.hardware import read_hardware
from tests.cli.run import ROOT, pipeinfer


def test_it_says_what_is_here_in_a_table_and_in_json() -> None:
    told = pipeinfer("doctor")
    assert (told.returncode, told.stderr) == (0, "")
    shown = dict(line.split(maxsplit=1) for line in told.stdout.splitlines())
    found = json.loads(pipeinfer("doctor", "--json").stdout)
    assert (found["pipeinfer"], found["launcher"], found["ranks"]) == (__version__, "none", 1)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"]
    assert found["memory"] > 2**28
    assert {name: shown[name] for name in ("pipeinfer", "python", "torch", "mpi", "host")} == {
        name: found[name] for name in ("pipeinfer", "python", "torch", "mpi", "host")
    }
    columns = {len(line) - len(line.split(maxsplit=1)[1]) for line in told.stdout.splitlines()}
    assert columns == {14}, "the values stand in one column"


@pytest.mark.slow
def test_under_a_launcher_one_rank_speaks_for_all() -> None:
    line = [sys.executable, "-m", "launch.mpiexec", "-n", "2", "--"]
    line += [sys.executable, "-m", "pipeinfer", "doctor", "--json"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)
    assert (found["ranks"], found["hosts"]) == (2, 1)
    assert found["launcher"] != "none"
    assert found["mpi"].startswith(("Open MPI", "MPICH", "Intel"))


@pytest.mark.slow
def test_it_measures_this_host_and_two_ranks_of_it(tmp_path: Path) -> None:
    done = pipeinfer("doctor", "--measure", "--out", str(tmp_path / "here.toml"), timeout_s=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    here = read_hardware(str(tmp_path / "here.toml"))
    assert 1e8 < here.bandwidth < 1e13
    assert 1e-8 < here.link.delay_s < 1e-1
    assert 1e7 < here.link.bandwidth < 1e12
    for arithmetic in here.arithmetic.values():
        assert 1e8 < arithmetic.peak < 1e15
        assert 1e-6 < arithmetic.overhead_s < 1e-1
        for curve in (arithmetic.linear, arithmetic.attention):
            assert curve is not None
            assert curve.seconds(1e6, 64) > curve.seconds(1e6, 1), "64 rows take longer than one"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--out x.toml", "--out without --measure"),
        ("--target x", "--target without --validate"),
        ("--measure --json", "--json with --measure"),
        ("--measure --validate h200", "not allowed with"),
        ("--device cuda", "--device without --measure or --validate"),
        ("--measure --device abacus", "torch finds no device abacus here; name one of cpu"),
        ("--measure --out nowhere/x.toml", "nowhere/x.toml cannot be written"),
        ("--validate cray", "there is no cray in benchmarks/hardware"),
        ("--validate dual-xeon-e5-1gbe --target nowhere", "nowhere: no such model directory"),
    ],
)
def test_what_is_refused(words: str, says: str) -> None:
    done = pipeinfer("doctor", *words.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pipeinfer: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_one_rank_of_a_job_has_no_link_to_measure() -> None:
    line = [sys.executable, "-m", "launch.mpiexec", "-n", "1", "--"]
    line += [sys.executable, "-m", "pipeinfer", "doctor", "--measure"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert "pipeinfer: one rank has no link to measure; start at least two" in done.stderr
