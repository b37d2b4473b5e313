"""The command line where its surroundings are not what a program expects. Real processes; few, because each costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.run import ROOT

PIPEINFER = (sys.executable, "-P", "-m", "pipeinfer")
DECODE = ("run", "--prompt", "def f", "--ignore-eos", "--ranks")
FULL = "pipeinfer: standard output cannot be written (No space left on device)\n"


def started(
    *arguments: str,
    before: tuple[str, ...] = (),
    stdout: int = subprocess.PIPE,
    cwd: Path | None = None,
    without: str = "",
    **environ: str,
) -> subprocess.CompletedProcess[str]:
    """``pipeinfer ARGUMENTS`` in ``cwd``, started by the program and words ``before``; no variable ``without``."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    env.pop(without, None)
    return subprocess.run(
        [*before, *PIPEINFER, *arguments], stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, cwd=cwd,
        env=env, encoding="utf-8", timeout=100, check=False,
    )  # fmt: skip


@pytest.fixture
def left() -> Iterator[int]:
    """The end of a pipe whose reader has left."""
    source, sink = os.pipe()
    os.close(source)
    yield sink
    os.close(sink)


@pytest.fixture
def full() -> Iterator[int]:
    """A descriptor on a full disk."""
    disk = os.open("/dev/full", os.O_WRONLY)
    yield disk
    os.close(disk)


@pytest.mark.parametrize("words", ["--help", "--version", "slurm-script run -- --prompt x"])
def test_what_nobody_got_did_not_succeed(words: str, left: int, full: int) -> None:
    for disk, expected in ((left, (141, "")), (full, (1, FULL))):
        done = started(*words.split(), stdout=disk)
        assert (done.returncode, done.stderr) == expected


@pytest.mark.slow
def test_ranks_end_where_nobody_reads_what_they_decode(left: int) -> None:
    done = started(*DECODE, "2", "--max-new-tokens", "900", stdout=left)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
def test_a_bench_on_ranks_of_its_own_notices_a_full_disk(full: int) -> None:
    words = "bench real-builtin --ranks 2 --repeats 1 --prompts 1 --tokens 4 --policies plain"
    done = started(*words.split(), stdout=full)
    assert (done.returncode, done.stderr) == (1, FULL)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_descriptors_that_are_closed(closed: str) -> None:
    shell = ("sh", "-c", f'"$@" {closed}', "sh")
    assert started("--version", before=shell).returncode == 0
    done = started("run", "--prompt", "x", "--max-new-tokens", "0", before=shell)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "environ",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=lambda environ: ",".join(environ),
)
def test_text_is_utf8_whatever_the_locale_says(environ: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "ö").mkdir()
    done = started("slurm-script", "--out", "ö/schrift", "run", "--", "--prompt", "naïve ☃", cwd=tmp_path, **environ)
    assert (done.returncode, done.stderr) == (0, "ö/schrift is written; `sbatch ö/schrift` submits it\n")
    assert "naïve ☃" in (tmp_path / "ö/schrift").read_text(encoding="utf-8")


@pytest.mark.slow
def test_files_of_the_user_do_not_pass_for_ours(tmp_path: Path) -> None:
    for name in ("random.py", "launch.py", "torch.py", "stages/__init__.py", "numpy/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('shadowed')")
    done = started(*DECODE, "2", "--max-new-tokens", "4", cwd=tmp_path, TMPDIR=str(tmp_path / "random.py"))
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    shutil.rmtree(tmp_path)
    shell = ("sh", "-c", f'mkdir {tmp_path} && cd {tmp_path} && rmdir {tmp_path} && "$@"', "sh")
    done = started(*DECODE, "2", before=shell)
    assert done.returncode == 2 and done.stderr.startswith("pipeinfer: the current directory cannot be used"), done


def namespaces() -> str:
    """Why there are no namespaces for a test; empty if there are."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    tried = ["unshare", "-m", "-u", "unshare", "-U", "--map-user=12345", "true"]
    made = subprocess.run(tried, capture_output=True, text=True, check=False)
    return made.stderr.strip()


@pytest.mark.slow
def test_a_host_with_an_odd_name_little_shared_memory_an_outer_job_and_a_user_without_a_name(tmp_path: Path) -> None:
    """Every one of these stopped the ranks of Open MPI or MPICH before they had a word of ours to say."""
    if why := namespaces():
        pytest.skip(f"needs root or its like ({why})")
    script = tmp_path / "script"
    script.write_text(
        'hostname 10.1.2.3 && mount -t tmpfs -o size=1m none /dev/shm && exec unshare -U --map-user=12345 "$@"'
    )
    outer = {"SLURM_JOBID": "5", "SLURM_NODELIST": "a,b", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "1(x2)"}
    before = ("unshare", "-m", "-u", "sh", str(script))
    done = started(*DECODE, "2", "--max-new-tokens", "4", before=before, cwd=tmp_path, without="HOME", **outer)
    if "MPICH need" in done.stderr:
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    else:
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert list(tmp_path.iterdir()) == [script]
