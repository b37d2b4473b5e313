"""Suites over real MPI ranks, and real weights beside transformers. That emulation takes the time that the simulator
says, and that speculation gains there and never costs, is measured only on request (QUIET); in virtual time always."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeinfer.bench.llama_cpp import is_here
from tests.cli.run import here, pipeinfer

pytestmark = pytest.mark.slow

EIGHT_STAGES = """
title = "eight stages"
execution = "emulated"
policies = ["plain", "sync-chain", "continuous"]
repeats = {repeats}
[[points]]
stages = 8
acceptance = [[0.8]]
draft_time = 0.5
stage_ms = {stage_ms}
tokens = {tokens}
"""
NEVER_RIGHT = """
title = "no guess is right though the draft claims that most are"
execution = "emulated"
policies = ["plain", "continuous"]
repeats = 3
[[points]]
stages = 8
acceptance = [[0.0]]
claims = [[0.8]]
draft_time = 0.5
stage_ms = 20.0
tokens = 32
"""
BURSTS = """stages = 2
requests = 2
arrivals = "bursts"
"""
QUIET = pytest.mark.skipif(
    os.environ.get("PIPEINFER_MEASURE") != "1",
    reason="compares measured times, which need a machine of one's own: PIPEINFER_MEASURE=1",
)


def measured(tmp_path: Path, text: str, *arguments: str) -> dict[str, dict[str, Any]]:
    path = tmp_path / "suite.toml"
    path.write_text(text)
    result = (here if "--simulate" in arguments else pipeinfer)("bench", str(path), "--json", *arguments)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return {row["policy"]: row for row in map(json.loads, result.stdout.splitlines())}


def test_speculation_gains_and_costs_nothing_where_no_guess_is_right(tmp_path: Path) -> None:
    gains = measured(tmp_path, EIGHT_STAGES.format(repeats=2, stage_ms=20.0, tokens=40), "--simulate")
    assert gains["continuous"]["ratio_to_plain"] >= 2.5
    costs = measured(tmp_path, NEVER_RIGHT, "--simulate")
    assert costs["continuous"]["ratio_to_plain"] >= 0.97
    assert costs["continuous"]["ttft_ms"] <= 1.1 * costs["plain"]["ttft_ms"]


@pytest.mark.parametrize("stages", ["stages = 5", "stages = 3\ntp = 2", BURSTS])
def test_an_emulated_job_says_the_simulator_s_tokens(tmp_path: Path, stages: str) -> None:
    suite = EIGHT_STAGES.format(repeats=1, stage_ms=1.0, tokens=16).replace("stages = 8", stages)
    emulated, simulated = (measured(tmp_path, suite, flag) for flag in ("--emulate", "--simulate"))
    assert emulated.keys() == simulated.keys()
    for policy, row in emulated.items():
        told = simulated[policy]
        assert (row["execution"], told["execution"]) == ("emulated", "simulated")
        for key in ("tokens_digest", "stages", "ranks"):
            assert row[key] == told[key], policy
        assert row["tokens_per_s"]["n"] == 1
    assert emulated["plain"]["messages_per_token"] == pytest.approx(simulated["plain"]["messages_per_token"], rel=0.3)


@QUIET
def test_emulation_agrees_with_the_simulator_and_speculation_gains(tmp_path: Path) -> None:
    suite = EIGHT_STAGES.format(repeats=2, stage_ms=20.0, tokens=40)
    emulated, simulated = (measured(tmp_path, suite, flag) for flag in ("--emulate", "--simulate"))
    assert emulated["continuous"]["ratio_to_plain"] >= 2.5
    for policy, row in emulated.items():
        ratio = row["tokens_per_s"]["median"] / simulated[policy]["tokens_per_s"]["median"]
        assert 0.85 < ratio < 1.1, f"{policy}: {ratio:.3f} of the simulator"


@QUIET
def test_with_no_guess_right_it_is_as_fast_as_plain_decoding(tmp_path: Path) -> None:
    found = measured(tmp_path, NEVER_RIGHT)
    assert found["continuous"]["ratio_to_plain"] >= 0.97
    assert found["continuous"]["ttft_ms"] <= 1.1 * found["plain"]["ttft_ms"]


def test_real_weights_beside_transformers(tmp_path: Path) -> None:
    arguments = ["--ranks", "2", "--repeats", "1", "--prompts", "2", "--tokens", "8"]
    names = "hf,plain,continuous,hf-assisted"
    result = pipeinfer("bench", "real-builtin", "--json", *arguments, "--policies", names)
    assert result.returncode == 0, result.stderr
    rows = {row["policy"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert list(rows) == names.split(",")
    assert rows["continuous"]["stages"] == 1
    assert rows["continuous"]["messages_per_token"] > 0
    assert rows["hf"]["acceptance_rate"] is None
    assert rows["hf"]["tokens_per_s"]["n"] == 2


PAIR = """
title = "a pair on one rank"
execution = "real"
policies = ["plain", "continuous", "hf", {rivals}]
once = ["hf"]
passes = true
repeats = 2
[[points]]
ranks = 1
target = "builtin"
draft = "builtin"
tokens = 24
"""


def test_a_pair_on_one_rank_with_its_passes_and_the_ideal_that_follows_from_them(tmp_path: Path) -> None:
    """Beside llama.cpp where it is installed."""
    rivals = '"llama.cpp", "llama.cpp-assisted-3"' if is_here() else ""
    rows = measured(tmp_path, PAIR.format(rivals=rivals))
    assert {name: row["tokens_per_s"]["n"] for name, row in rows.items() if name != "hf"} == dict.fromkeys(
        rows.keys() - {"hf"}, 2
    )
    assert rows["hf"]["tokens_per_s"]["n"] == 1
    assert {row["equal_prefix"] for name, row in rows.items() if not name.startswith("llama")} == {1.0}
    assert "transformers" in rows["hf"]["peer"]["library"] and rows["plain"]["peer"] is None
    passes = rows["plain"]["passes"]
    assert set(passes["pass_ms"]) == {"ours", "draft"} | ({"llama.cpp", "llama.cpp's draft"} if rivals else set())
    assert all(taken > 0 for by_rows in passes["pass_ms"].values() for taken in by_rows.values())
    assert 0 < passes["agreement"] <= 1
    plain = rows["plain"]["tokens_per_s"]["median"]
    assert rows["continuous"]["ideal_tokens_per_s"] == pytest.approx(plain * passes["gain"])
