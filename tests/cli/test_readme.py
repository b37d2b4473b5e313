"""Every command and every program in the README does what it says, as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.mpiexec import command
from pipeinfer import Engine
from tests.cli.run import ROOT, pipeinfer

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("   #")[0].strip()
    for _, block in BLOCKS
    for line in block.splitlines()
    if re.match(r"(pipeinfer|mpirun|srun|python -m) ", line) and "venv" not in line
]
SCRIPTS = [line for line in COMMANDS if line.startswith("pipeinfer slurm-script ")]
ELSEWHERE = {
    "srun": "needs Slurm",
    "--target Qwen": "needs weights that are not here",
    "pipeinfer serve": "ends by a signal only; test_serve.py has it",
    "pipeinfer batch": "needs a file of requests; test_batch.py has it",
}

pytestmark = pytest.mark.slow


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 4
    assert [info for info, _ in BLOCKS].count("python") == 1


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in SCRIPTS])
def test_commands(line: str) -> None:
    for words, reason in ELSEWHERE.items():
        if words in line:
            pytest.skip(f"{reason}: {line}")
    program = shlex.split(line)
    if program[0] == "mpirun":
        assert program[1] == "-n"
        program, environ = command(int(program[2]), [sys.executable, "-m", *program[3:]])
    else:
        program, environ = [sys.executable, "-m", *program], None
    result = subprocess.run(program, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 20
    assert "tokens/s" in result.stderr


@pytest.mark.parametrize("line", SCRIPTS)
def test_batch_scripts(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = pipeinfer(*shlex.split(line)[1:])
    assert written.returncode == 0, written.stderr
    checked = subprocess.run(["bash", "-n", tmp_path / "job.sbatch"], capture_output=True, timeout=300, check=False)
    assert (checked.returncode, checked.stderr) == (0, b"")


def test_the_python_program() -> None:
    (program,) = [block for info, block in BLOCKS if info == "python"]
    scope: dict[str, object] = {}
    exec(program, scope)
    assert isinstance(scope["Engine"], type)
    assert scope["Engine"] is Engine
    assert scope["answer"].text  # type: ignore[attr-defined]
