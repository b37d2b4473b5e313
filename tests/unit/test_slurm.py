"""Batch scripts: what they ask of Slurm, and what a shell makes of them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch.slurm import DIRECTIVES, LAUNCHERS, batch_script
from pipeinfer.core.errors import UserError

DEFAULTS = {directive.name: directive.default for directive in DIRECTIVES}
PROGRAM = ["pipeinfer", "run", "--prompt", "x"]
# Instead of Slurm's programs: what they would have been told, each word closed by a NUL, and the threads.
TOLD = """
module() { echo "module $*"; }
srun() { printf '%s\\0' srun "$@" "$OMP_NUM_THREADS"; }
mpirun() { printf '%s\\0' mpirun "$@" "$OMP_NUM_THREADS"; }
source "$0"
"""


def bash(*arguments: str) -> str:
    environ = {"PATH": os.environ["PATH"], "SLURM_CPUS_PER_TASK": "3", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash", *arguments], env=environ, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.decode()


def told(script: str, folder: Path) -> list[str]:
    """The words, up to the threads, that a launcher would be told by ``script``."""
    file = folder / "job.sbatch"
    file.write_bytes(script.encode())
    *words, end = bash("-c", TOLD, str(file)).split("\0")
    assert end == ""
    return words


def directives(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))


def test_only_what_is_asked_for_or_has_a_default_is_asked_of_slurm() -> None:
    script = batch_script(PROGRAM, DEFAULTS)
    assert directives(script) == {
        "job-name": "pipeinfer", "nodes": "4", "ntasks-per-node": "1", "cpus-per-task": "1", "time": "00:30:00",
        "output": "%x-%j.out", "error": "%x-%j.err",
    }  # fmt: skip
    asked = {"nodes": "32", "ntasks-per-node": "2", "cpus-per-task": "28", "mem": "64G", "time": "1-12:00:00",
             "job-name": "my.job", "output": "logs/%x.out", "partition": "long,short", "account": "p_1"}  # fmt: skip
    assert directives(batch_script(PROGRAM, {**DEFAULTS, **asked})) == {"error": "%x-%j.err", **asked}


def test_slurm_reads_all_directives() -> None:
    """It stops at the first line that is neither empty nor a comment."""
    before, _, after = batch_script(PROGRAM, DEFAULTS).partition("set -euo pipefail")
    assert before.count("#SBATCH") == len(directives(before))
    assert all(line.startswith("#") or not line for line in before.splitlines())
    assert "#SBATCH" not in after


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("modules", [(), ("gcc/13", "openmpi/5.0")])
@pytest.mark.parametrize("venv", [None, Path("/some where/it's")])
def test_every_script_is_one_for_bash(
    launcher: str, modules: tuple[str, ...], venv: Path | None, tmp_path: Path
) -> None:
    file = tmp_path / "job.sbatch"
    file.write_text(batch_script(PROGRAM, DEFAULTS, modules, venv, launcher))
    assert bash("-n", str(file)) == ""


def test_one_launcher_is_active_and_the_other_needs_only_its_mark_removed(tmp_path: Path) -> None:
    lines = {
        "srun": ["srun", "--mpi=pmi2", "--cpus-per-task=3", "--wait=30", *PROGRAM, "3"],
        "mpirun": ["mpirun", "--map-by", "slot:PE=3", "--bind-to", "core", *PROGRAM, "3"],
    }
    for one, other in (("srun", "mpirun"), ("mpirun", "srun")):
        script = batch_script(PROGRAM, DEFAULTS, launcher=one, mpi="pmi2")
        assert told(script, tmp_path) == lines[one]
        swapped = re.sub(r'^(# )?(.*"\${program\[@\]}")$', lambda m: m[2] if m[1] else f"# {m[2]}", script, flags=re.M)
        assert told(swapped, tmp_path) == lines[other]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30), max_size=4))
@settings(max_examples=40)
@example(["", "a b", "'", '"$HOME`id`\\', "two\nlines\n", "#no comment", "%name", "$SLURM_JOB_ID", "!x", "*", "ü"])
def test_arguments_come_through_the_shell_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, arguments: list[str]
) -> None:
    script = batch_script([*PROGRAM, *arguments], DEFAULTS)
    assert told(script, tmp_path_factory.getbasetemp())[-len(arguments) - 5 : -1] == [*PROGRAM, *arguments]


def test_modules_come_before_the_environment_and_their_unset_variables_do_no_harm(tmp_path: Path) -> None:
    activate = tmp_path / "it's mine/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.write_text('echo "entered$NOBODY_HAS_SET_THIS"\n')
    script = batch_script(PROGRAM, DEFAULTS, ["gcc/13", "openmpi"], activate.parents[1])
    assert script.startswith("#!/bin/bash -l\n"), "elsewhere `module` may be unknown"
    assert told(script, tmp_path)[0] == "module load gcc/13 openmpi\nentered\nsrun"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nodes", "0"), ("nodes", "4-8"), ("nodes", "٤"), ("cpus-per-task", "-1"), ("ntasks-per-node", "two"),
        ("mem", "64 G"), ("mem", "64GiB"), ("time", "1h"), ("time", "1-"), ("time", "1:2:3:4"), ("job-name", "a b"),
        ("job-name", ""), ("output", "a#b"), ("output", "'x'"), ("partition", "a\n#SBATCH --uid=0"), ("account", "$x"),
    ],
)  # fmt: skip
def test_what_sbatch_would_refuse_or_misread_is_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"--{name} .*; it should look like"):
        batch_script(PROGRAM, {**DEFAULTS, name: value})


@pytest.mark.parametrize("value", ["30", "30:00", "01:00:00", "2-0", "2-12:30", "2-12:30:15"])
def test_every_form_of_a_time_is_taken(value: str) -> None:
    assert directives(batch_script(PROGRAM, {**DEFAULTS, "time": value}))["time"] == value
