"""Suites over real MPI ranks: emulation agrees with the simulator, speculation gains there and never costs, and real
weights beside transformers give the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.run import pipeinfer

pytestmark = pytest.mark.slow

EIGHT_STAGES = """
title = "eight stages of 20 ms"
execution = "emulated"
policies = ["plain", "sync-chain", "continuous"]
repeats = 2
[[points]]
stages = 8
acceptance = [[0.8]]
draft_time = 0.5
stage_ms = 20.0
tokens = 40
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


def measured(tmp_path: Path, text: str, *arguments: str) -> dict[str, dict[str, Any]]:
    path = tmp_path / "suite.toml"
    path.write_text(text)
    result = pipeinfer("bench", str(path), "--json", *arguments, timeout_s=110)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    return {row["policy"]: row for row in map(json.loads, result.stdout.splitlines())}


def test_emulation_agrees_with_the_simulator_and_speculation_gains(tmp_path: Path) -> None:
    emulated, simulated = (measured(tmp_path, EIGHT_STAGES, flag) for flag in ("--emulate", "--simulate"))
    assert emulated["continuous"]["ratio_to_plain"] >= 2.5
    for policy, row in emulated.items():
        ratio = row["tokens_per_s"]["median"] / simulated[policy]["tokens_per_s"]["median"]
        assert 0.85 < ratio < 1.1, f"{policy}: {ratio:.3f} of the simulator"
    assert emulated["plain"]["messages_per_token"] == pytest.approx(simulated["plain"]["messages_per_token"], rel=0.3)


def test_with_no_guess_right_it_is_as_fast_as_plain_decoding(tmp_path: Path) -> None:
    found = measured(tmp_path, NEVER_RIGHT)
    assert found["continuous"]["ratio_to_plain"] >= 0.97
    assert found["continuous"]["ttft_ms"] <= 1.1 * found["plain"]["ttft_ms"]


def test_real_weights_beside_transformers(tmp_path: Path) -> None:
    arguments = ["--ranks", "3", "--repeats", "1", "--prompts", "2", "--tokens", "24"]
    names = "hf,plain,continuous,hf-assisted"
    result = pipeinfer("bench", "real-builtin", "--json", *arguments, "--policies", names, timeout_s=110)
    assert result.returncode == 0, result.stderr
    rows = {row["policy"]: row for row in map(json.loads, result.stdout.splitlines())}
    assert list(rows) == names.split(",")
    assert rows["continuous"]["stages"] == 2
    assert rows["continuous"]["messages_per_token"] > 0
    assert rows["hf"]["acceptance_rate"] is None
    assert rows["hf"]["tokens_per_s"]["n"] == 2
