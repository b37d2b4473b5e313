"""The part of the profile that needs ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_stage_on_a_rank_of_its_own_is_timed() -> None:
    line = [sys.executable, "-m", "benchmarks.profile", "--only", "ranks", "--json"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, 1), done.stderr  # a busy machine may well exceed a budget
    bare, layered, idle = (json.loads(row) for row in done.stdout.splitlines())
    assert bare["n"] == layered["n"] > 50, "the same runs were computed"
    assert min(row["median_us"] for row in (bare, layered, idle)) > 0
