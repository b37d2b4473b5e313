"""Eight paced stages of 20 ms over real MPI (EMULATED: stages sleep, the model is a hash chain): what speculation
gains, and that it costs nothing where no guess is ever right, even if the draft believes that most are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.mpiexec import command

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def speeds(*arguments: str) -> dict[str, float]:
    """Median tokens per second of each policy."""
    line, environ = command(9, [sys.executable, "-m", "benchmarks.paced", "--stage-ms", "20", *arguments])
    environ["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=110, check=False)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    rows = [row.split() for row in result.stdout.splitlines() if not row.startswith("#")]
    return {row[0]: float(row[1]) for row in rows if row}


def test_with_four_of_five_guesses_right_it_is_at_least_two_and_a_half_times_as_fast() -> None:
    found = speeds("--acceptance", "0.8", "--tokens", "40", "--repeats", "2")
    assert found["continuous"] >= 2.5 * found["plain"], found


def test_with_no_guess_right_it_is_as_fast_as_plain_decoding() -> None:
    found = speeds("--acceptance", "0", "--claims", "0.8", "--tokens", "32", "--repeats", "3")
    assert found["continuous"] >= 0.97 * found["plain"], found
