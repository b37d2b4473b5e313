"""`pipeinfer bench` on the command line: a table or JSON, a whole file, and one clear line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeinfer.bench.llama_cpp import is_here
from tests.cli.run import here, pipeinfer

SMALL = """
title = "a small one"
execution = "simulated"
policies = ["plain", "sync-chain", "continuous"]
repeats = 2
[[points]]
stages = [2, 3]
top1 = 0.8
draft_time = 0.2
tokens = 24
"""
KEYS = {
    "suite", "policy", "execution", "ranks", "stages", "acceptance", "draft_time", "hardware", "tokens_per_s",
    "ttft_ms", "tpot_ms", "itl_ms", "acceptance_rate", "accept_length",
    "tokens_per_correction", "waste", "bubble", "cancel_latency_ms",
    "messages_per_token", "bytes_per_token", "ideal_tokens_per_s", "ratio_to_plain", "fingerprint", "samples",
}  # fmt: skip


@pytest.fixture
def suite(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return str(path)


@pytest.mark.slow
def test_rows_as_a_table_and_as_json(suite: str, tmp_path: Path) -> None:
    table = pipeinfer("bench", suite, "--out", str(tmp_path / "out"))
    assert table.returncode == 0, table.stderr
    comments = [line for line in table.stdout.splitlines() if line.startswith("#")]
    rows = [line.split() for line in table.stdout.splitlines() if not line.startswith("#")]
    assert "SIMULATED" in table.stdout
    (header,) = (line.split()[1:] for line in comments if "tokens/s  " in line)
    assert [row[header.index("policy")] for row in rows] == ["plain", "sync-chain", "continuous"] * 2
    assert all(len(row) == len(header) for row in rows)
    kept = (tmp_path / "out" / "small.simulated.jsonl").read_text().splitlines()
    again = here("bench", suite, "--json", "--policies", "continuous,plain")
    assert again.returncode == 0, again.stderr
    found = [json.loads(line) for line in again.stdout.splitlines()]
    assert all(row.keys() >= KEYS for row in found)
    assert len(kept) == 6
    before = {(row["policy"], row["ranks"]): row["samples"] for row in map(json.loads, kept)}
    for row in found:  # virtual time repeats itself
        assert row["samples"] == before[row["policy"], row["ranks"]]
        assert row["fingerprint"]["host"]
        assert row["tokens_per_s"]["n"] == 2
    assert found[0]["ratio_to_plain"] > 1.2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nowhere"], "benchmarks/suites"),
        (["throughput", "--policies", "nobody"], "nobody"),
        (["throughput", "--policies", "hf", "--simulate"], "real weights"),
        (["real-builtin", "--policies", "hf,hf-assisted"], "only peers"),
        (["throughput", "--policies", "plain,llama.cpp"], "real weights"),
        (
            ["real-pair", "--target", "/no/such/pair", "--draft", "/no/such/pair"],
            "/no/such/pair: no such model directory",
        ),
        (["real-pair", "--target", "builtin"], "--target without --draft"),
        (["throughput", "--draft", "builtin"], "--draft builtin with a suite that is emulated"),
        (["throughput", "--repeats", "0"], "--repeats 0"),
        (["throughput", "--ranks", "0"], "--ranks 0"),
        (["throughput", "--out", "/dev/null/there", "--simulate"], "cannot be made"),
    ],
)
def test_refusals(arguments: list[str], word: str) -> None:
    result = here("bench", *arguments)
    assert result.returncode == 2
    assert word in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not [line for line in result.stdout.splitlines() if not line.startswith("#")]


@pytest.mark.skipif(is_here(), reason="the extra peers is installed")
def test_without_the_extra_one_line_says_how_to_get_it() -> None:
    result = here("bench", "real-pair")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "pip install 'pipeinfer[peers]'" in result.stderr
