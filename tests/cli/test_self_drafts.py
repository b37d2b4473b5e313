"""A target that drafts for itself, from the command line; and ``pipeinfer calibrate --drafts``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.run import ROOT, here, pipeinfer


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "prompts").write_text("def read_lines(path):\nimport os\n")
    return str(tmp_path / "prompts")


def test_two_drafters_of_the_target_and_a_trace_that_replays(tmp_path: Path) -> None:
    """Synchronous: whether `continuous` has a guess in time depends on how busy the machine is."""
    policy = str(ROOT / "benchmarks/baselines/sync-tree.toml")
    job = ["--ranks", "3", "--drafters", "2", "--draft", "self:int4,layers=7", "--policy", policy]
    what = ["--prompt", "def read_lines(path):", "--max-new-tokens", "12", "--verify", "--json"]
    ran = pipeinfer("run", *job, *what, "--trace", str(tmp_path / "trace"))
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["config"]["drafts"] == ["self:int4,layers=7"] * 2
    assert found["metrics"]["acceptance_rate"] > 0
    assert "verified: all 12 tokens equal" in ran.stderr
    replayed = here("replay", *[str(tmp_path / f"trace.rank{rank}") for rank in range(3)])
    assert replayed.returncode == 0, replayed.stderr


def test_candidates_are_measured_and_the_best_is_named(prompts: str, tmp_path: Path) -> None:
    """On one rank without ranks to start; what is fastest depends on the machine."""
    names = ["self:int4,layers=7", "builtin", "none"]
    words = ["--drafts", ",".join(names), "--repeats", "1", "--max-new-tokens", "8", "--out", str(tmp_path / "fit")]
    done = here("calibrate", "--prompts", prompts, *words)
    assert done.returncode == 0, done.stderr
    heading, *rows, verdict = done.stdout.splitlines()
    assert heading.split()[:4] == ["draft", "agreement", "acceptance", "tokens/s"]
    found = {row.split()[0]: row.split()[1:] for row in rows}
    assert found.keys() == set(names)
    assert found["none"][0] == "-" and 0 < float(found["builtin"][0]) <= 1 and float(found[names[0]][0]) > 0.5
    speeds = [float(row.split()[3]) for row in rows]
    assert speeds == sorted(speeds, reverse=True)
    assert verdict.startswith(f"use --draft {rows[0].split()[0]}: ") and verdict.endswith("the median of 2 answers")
    assert json.loads((tmp_path / "fit").read_text())["drafts"] == [rows[0].split()[0]] * (rows[0].split()[0] != "none")
    assert "round 1 of 1: builtin" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--drafts builtin,self:int5", "unknown word 'int5'"),
        ("--drafts none,self:layers=8", "the target has 8 layers"),
        ("--drafts none,nowhere", "nowhere"),
        ("--drafts none --draft self:int4", "name all candidates with --drafts"),
        ("--drafts none --repeats 0", "--repeats 0"),
        ("--drafts none --ranks 12", "at most 8 ranks"),
        ("", "calibrate without --out"),
    ],
)
def test_what_is_refused_before_anything_is_measured(words: str, says: str, prompts: str) -> None:
    refused = here("calibrate", "--prompts", prompts, *words.split())
    assert refused.returncode == 2 and refused.stdout == ""
    assert says in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr
