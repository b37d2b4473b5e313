"""`pipeinfer doctor`: what it says, what it measures, what it refuses."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeinfer import __version__
from pipeinfer.bench import measure
from pipeinfer.cli.doctor import LARGE_NBYTES, TRIALS, best_trip_s, link_of
from pipeinfer.costs.hardware import Hardware, read_hardware
from tests.cli.run import ROOT, here, pipeinfer


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
    done = pipeinfer("doctor", "--measure", "--seconds", "1", "--out", str(tmp_path / "here.toml"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert_plausible(read_hardware(str(tmp_path / "here.toml")))


def assert_plausible(here: Hardware) -> None:
    assert 0 < here.bandwidth < 1e14 and 0 < here.link.bandwidth < 1e13 and 0 < here.link.delay_s < 10
    assert here.arithmetic.keys() == set(measure.DTYPES)
    for arithmetic in here.arithmetic.values():
        assert 0 < arithmetic.peak < 1e16 and 0 < arithmetic.overhead_s < 10
        assert arithmetic.linear is not None and arithmetic.attention is not None
        assert min(arithmetic.linear.bandwidth + arithmetic.attention.bandwidth) > 0


@pytest.mark.parametrize(
    ("small_s", "large_s", "latency_s", "rest_s"), [(1e-6, 1e-3, 1e-6, 999e-6), (2e-3, 1e-3, 0.5e-3, 0.5e-3)]
)
def test_a_link_on_a_busy_host_is_described_all_the_same(
    small_s: float, large_s: float, latency_s: float, rest_s: float
) -> None:
    assert link_of(small_s, large_s) == (latency_s, pytest.approx(LARGE_NBYTES / rest_s))


def test_on_a_slow_machine_it_ends_in_time(tmp_path: Path) -> None:
    """A machine on which whatever lies between two looks at the clock takes a tenth of a second."""
    looks = itertools.count()

    def now() -> float:
        return 0.1 * next(looks)

    described = measure.describe("a processor", 1, (1e-5, 1e9), clocks=measure.Clocks(now, now))
    assert now() < 1.2 * measure.SECONDS
    (tmp_path / "it.toml").write_text(described)
    assert_plausible(read_hardware(str(tmp_path / "it.toml")))


def test_what_takes_long_is_done_less_often_and_told_the_same() -> None:
    """Forty kernels, of 2 s each in all; there are 0.4 s."""
    clock, made = SimpleNamespace(now=0.0), []

    def kernel() -> None:
        clock.now += 0.05
        made.append(clock.now)

    probe = measure.Probe("cpu", measure.SECONDS, measure.Clocks(lambda: clock.now, lambda: clock.now))
    assert probe.usual_s([kernel] * 40) == pytest.approx(2.0)
    assert clock.now < 0.5
    assert len(made) < 10


@pytest.mark.parametrize(("trip_s", "trips"), [(1e-6, 1000), (5e-3, 125), (10.0, 3)])
def test_links_of_any_speed_are_measured_in_time(trip_s: float, trips: int) -> None:
    asked = list[int]()

    def ping(nbytes: int, repeats: int) -> float:
        asked.append(repeats)
        return trip_s

    here: Any = SimpleNamespace(is_head=True, size=3, ping=ping, agree=int)
    assert best_trip_s(here, 8, 1000) == trip_s
    assert asked == [TRIALS, trips]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--out x.toml", "--out without --measure"),
        ("--seconds 3", "--seconds without --measure"),
        ("--measure --seconds 0", "--seconds 0; give a number above 0"),
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
    done = here("doctor", *words.split())
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
