"""L9 for real ranks: what they wrote down replays to the same commands, whether the job ended well, failed, hung or
was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeinfer import Engine
from pipeinfer.core.ports import Compute, Computed, Event, Stalled
from pipeinfer.runtime.job_spec import JobSpec
from pipeinfer.runtime.replay import Retold, retell
from pipeinfer.runtime.trace import Trace
from tests.mpi.matrix import FULL
from tests.mpi.test_programs import PROMPT, ROOT, environment, under_mpiexec

pytestmark = pytest.mark.slow

BASELINES = ROOT / "benchmarks" / "baselines"


def replayed(path: Path) -> tuple[Trace, Retold]:
    trace = Trace(path)
    job_spec = JobSpec.of(trace.header.job_spec)
    return trace, retell({address: job_spec.machine(address) for address in trace.header.roles}, trace.steps())


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.rank*"))


def events(path: Path) -> list[type[Event]]:
    return [type(step.event) for step in Trace(path).steps()]


POLICIES = ["continuous", "pipeinfer.toml", *(["plain", "sync-tree.toml"] if FULL else [])]


@pytest.mark.parametrize("policy", POLICIES)
def test_three_ranks_replay_to_the_same_commands(policy: str, tmp_path: Path) -> None:
    name = str(BASELINES / policy) if policy.endswith(".toml") else policy
    with Engine(ranks=3, policy=name, timeout_s=300.0, trace=tmp_path / "run") as engine:
        assert engine is not None
        for count in (48, 12):
            engine.generate(PROMPT, count, ignore_eos=True)
        for piece in engine.stream(PROMPT, 900, ignore_eos=True):
            if piece:
                break  # the rest is aborted
    assert [path.name for path in files(tmp_path)] == [f"run.rank{rank}" for rank in range(3)]
    for rank, path in enumerate(files(tmp_path)):
        trace, retold = replayed(path)
        assert (retold.difference, trace.damage) == ("", "")
        assert retold.ended == set(trace.header.roles)
        assert retold.events == len(events(path)) > 30
        assert (trace.header.rank, trace.header.ranks) == (rank, 3)
        assert trace.header.config["trace"] == str(tmp_path / "run")
        assert trace.header.config["policy"]["name"] == policy.removesuffix(".toml")


def test_under_mpiexec_and_sampled(tmp_path: Path) -> None:
    how = ["--max-new-tokens", "32", "--temperature", "0.8", "--repetition-penalty", "1.2", "--drafters", "2"]
    result = under_mpiexec(
        4, "-m", "pipeinfer", "run", "--prompt", PROMPT, *how, "--trace", str(tmp_path / "run"), "--verify"
    )
    assert result.returncode == 0, result.stderr
    spans = [event for event in json.loads((tmp_path / "run.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert len({event["tid"] for event in spans}) == 6, "orchestrator, two stages, two drafters, the request"
    assert "unfinished" not in {event["cat"] for event in spans}, "every rank had written its last word"
    assert len(files(tmp_path)) == 4
    for path in files(tmp_path):
        trace, retold = replayed(path)
        assert (retold.difference, trace.damage) == ("", "")
        assert retold.ended == set(trace.header.roles)


def test_a_job_that_failed_leaves_readable_traces(tmp_path: Path) -> None:
    result = under_mpiexec(4, "-m", "tests.mpi.programs.failing", "raise", str(tmp_path / "run"))
    assert result.returncode != 0
    assert "RuntimeError: the tenth pass fails" in result.stderr
    assert len(files(tmp_path)) == 4
    for path in files(tmp_path):
        _, retold = replayed(path)
        assert retold.difference == ""
        assert retold.events > 10
        assert not retold.ended
    failed = list(Trace(tmp_path / "run.rank2").steps())
    begun = sum(isinstance(command, Compute) for step in failed for command in step.commands)
    ended = sum(isinstance(step.event, Computed) for step in failed)
    assert begun == ended + 1 >= 10, "the pass that failed is there, and without an end"


def test_a_job_that_hung_leaves_the_reason(tmp_path: Path) -> None:
    """The last stage is changed so as to lose runs. At home, where it is not, its trace shows the first one it lost."""
    result = under_mpiexec(4, "-m", "tests.mpi.programs.failing", "swallow", str(tmp_path / "run"))
    assert "nothing has moved" in result.stderr
    head, *others, guilty = files(tmp_path)
    assert events(head).count(Stalled) == 1
    for path in (head, *others):
        assert replayed(path)[1].difference == ""
    difference = replayed(guilty)[1].difference
    assert "stage 2 answers event " in difference
    # Whether the run was still wanted when it came, and so what ought to have followed, is a matter of timing.
    followed = r" was None, is (Compute\(job=10, |Send\(.*Result\(run=10, is_tombstone=True)"
    assert re.search(followed, difference), difference


def test_ranks_that_were_killed_leave_what_they_did(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "pipeinfer", "run", "--ranks", "3", "--prompt", PROMPT, "--max-new-tokens", "900",
            "--ignore-eos", "--trace", str(tmp_path / "run")]  # fmt: skip
    with subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(20)  # the ranks are up and decoding
        process.send_signal(signal.SIGKILL)
        process.stderr.read()  # which ends when the last rank is gone
    assert len(files(tmp_path)) == 3
    for path in files(tmp_path):
        _, retold = replayed(path)
        assert retold.difference == ""
        assert retold.events > 5


def test_a_trace_that_cannot_be_written_is_refused_by_one_rank(tmp_path: Path) -> None:
    result = under_mpiexec(3, "-m", "pipeinfer", "run", "--prompt", "x", "--trace", str(tmp_path / "no" / "run"))
    assert result.returncode == 2
    ours = [line for line in result.stderr.splitlines() if line.startswith("pipeinfer:")]
    assert len(ours) == 1
    assert f"{tmp_path / 'no' / 'run.rank0'} cannot be written (No such file or directory); name" in ours[0]


def test_a_rank_whose_host_lacks_the_place_says_so(tmp_path: Path) -> None:
    """Rank 1 looks elsewhere, as if it were on a host without the folder."""
    program = (
        "import os, sys; from launch.environment import launched; from pipeinfer.cli import main\n"
        "os.chdir(sys.argv[1 + launched().rank]); sys.exit(main(['run', '--prompt', 'x', '--trace', 'here/run']))"
    )
    (tmp_path / "one" / "here").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    result = under_mpiexec(2, "-c", program, str(tmp_path / "one"), str(tmp_path / "two"))
    assert result.returncode == 2
    ours = [line for line in result.stderr.splitlines() if line.startswith("pipeinfer:")]
    assert ours == [
        "pipeinfer: the trace here/run.rank0 cannot be written (No such file or directory); "
        "name a file in a directory that is writable"
    ]
    assert not os.listdir(tmp_path / "one" / "here")
