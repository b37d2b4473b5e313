"""``pipeinfer slurm-script``: a script on standard output or in a file, or one line about what is wrong."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from tests.cli.run import here, pipeinfer

JOB = ("--", "--prompt", "def f(x):\n    '''$x'''", "--max-new-tokens", "8")


def test_the_script_goes_to_standard_output_or_whole_into_a_file(tmp_path: Path) -> None:
    shown = pipeinfer("slurm-script", "run", "--nodes", "2", *JOB)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "#SBATCH --nodes=2\n" in shown.stdout
    assert f". {shlex.quote(sys.prefix)}/bin/activate\n" in shown.stdout, "the environment that wrote it"
    file = tmp_path / "job.sbatch"
    stored = here("slurm-script", "run", "--nodes", "2", "--out", str(file), *JOB)
    assert (stored.returncode, stored.stdout) == (0, "")
    assert f"sbatch {file}" in stored.stderr
    assert file.read_text() == shown.stdout
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("bench", ["SUITE.toml", "--json"]),
        ("calibrate", ["--prompts", "README.md", "--out", "a b"]),
        ("doctor", ["--measure"]),
    ],
)
def test_whatever_has_work_for_several_ranks_can_be_a_job(command: str, arguments: list[str]) -> None:
    done = pipeinfer("slurm-script", command, "--venv", "none", "--", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"program=({shlex.join(['pipeinfer', command, *arguments])})\n" in done.stdout
    assert "activate" not in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("run", ["-- ARGUMENT", "slurm-script --help"]),
        ("run -- --promt x", ["unrecognized", "--promt"]),
        ("run -- --prompt x --max-new-tokens many", ["--max-new-tokens", "many"]),
        ("run -- --prompt x --ranks 4", ["--ranks in a batch job", "--ntasks-per-node"]),
        ("run -- --prompt x --rank 4", ["--ranks in a batch job", "--ntasks-per-node"]),
        ("run -- --json", ["no standard input", "--prompt-file"]),
        ("rum -- --prompt x", ["rum", "choose from", "run"]),
        ("replay -- trace", ["replay", "choose from", "run"]),
        ("bench -- suite.toml --repeats many", ["--repeats", "many"]),
        ("run --launcher ssh -- --prompt x", ["--launcher", "ssh", "srun"]),
        ("run --time 1h -- --prompt x", ["--time '1h'", "HH:MM:SS"]),
        ("run --venv tests -- --prompt x", ["tests is no virtual environment", "bin/activate", "none"]),
        ("run --out no/such/folder/job -- --prompt x", ["no/such/folder/job cannot be written"]),
        ("run -- --prompt \udcff", ["not UTF-8"]),
    ],
)
def test_mistakes_are_found_before_the_job_queues(words: str, says: list[str]) -> None:
    done = here("slurm-script", *words.split(" "))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pipeinfer: ")
    assert done.stderr.count("\n") == 1
    for word in says:
        assert word in done.stderr
