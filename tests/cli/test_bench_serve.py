"""`pipeinfer bench serve` against our own server, with the built-in pair."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.run import ROOT, here, pipeinfer

HANG_S = 300.0
READY = re.compile(r"is served at (http://127\.0\.0\.1:\d+)")
KEY = "secret"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Where a server listens that wants a key."""
    line = [sys.executable, "-m", "pipeinfer", "serve", "--port", "0", "--api-key", KEY, "--grace", "0"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(line, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            while not (ready := READY.search((said or [""])[-1])):
                said.append(process.stderr.readline())
                assert said[-1], said
            yield ready[1]
        finally:
            process.terminate()
            process.wait(HANG_S)


def rows(url: str, *arguments: str, code: int = 0) -> list[Any]:
    done = pipeinfer("bench", "serve", "--url", url, "--json", *arguments, environ={"PIPEINFER_API_KEY": KEY})
    assert (done.returncode, done.stderr) == (code, ""), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_a_row_for_each_concurrency(url: str, tmp_path: Path) -> None:
    options = ["--concurrency", "1,3", "--requests", "6", "--distinct", "2", "--max-tokens", "12", "--ignore-eos"]
    found = rows(f"{url}/v1", *options, "--repeat-check", "--ttft-ms", "0", "--out", str(tmp_path / "rows"))
    assert [row["concurrency"] for row in found] == [1, 3]
    for row in found:
        assert (row["completed"], row["errors"], row["aborted"], row["reasons"]) == (6, 0, 0, {})
        assert (row["model"], row["tokens_by"], row["output_tokens"]) == ("builtin", "usage", 72)
        assert row["output_throughput"] == pytest.approx(72 / row["duration_s"])
        assert row["goodput"] == 0 < row["request_throughput"]
        assert 0 < row["ttft_ms"]["p50"] <= row["ttft_ms"]["p99"] <= row["e2el_ms"]["p99"]
        assert row["tpot_ms"]["p50"] >= 0 and row["itl_ms"]["p50"] >= 0
        assert (row["repeats"]["compared"], row["repeats"]["differences"]) == (4, 0)
        assert row["input_tokens"] > 6 and row["fingerprint"]["host"]
    assert [json.loads(line) for line in (tmp_path / "rows/serve.jsonl").read_text().splitlines()] == found


@pytest.mark.slow
def test_aborted_requests_at_random_times(url: str) -> None:
    options = ["--requests", "24", "--distinct", "5", "--max-tokens", "16", "--rate", "1000", "--abort-share", "0.5"]
    (row,) = rows(url, *options, "--temperature", "0.9", "--repeat-check", "--seed", "3")
    assert 4 <= row["aborted"] <= 20 and row["aborted"] + row["completed"] == 24
    assert row["repeats"]["compared"] >= 12 and row["repeats"]["differences"] == 0
    (table,) = [
        pipeinfer("bench", "serve", "--url", url, "--api-key", KEY, "--requests", "2", "--max-tokens", "4").stdout
    ]
    comments = [line for line in table.splitlines() if line.startswith("#")]
    (header,) = [line.split()[1:] for line in comments if " tokens/s " in line]
    (line,) = [line.split() for line in table.splitlines() if not line.startswith("#")]
    assert dict(zip(header, line, strict=True)) | {"clients": "1", "done": "2"} == dict(zip(header, line, strict=True))


@pytest.mark.slow
def test_what_a_server_refuses_is_told(url: str) -> None:
    for more, word in [
        (["--api-key", "guess"], "HTTP 401"),
        (["--api-key", KEY, "--chat"], "chat template"),
        (["--api-key", KEY, "--model", "other"], "HTTP 404"),
    ]:
        done = here("bench", "serve", "--url", url, "--requests", "1", *more)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert word in done.stderr
    (row,) = rows(url, "--requests", "2", "--max-tokens", "16", "--abort-share", "1", code=1)
    assert (row["completed"], row["aborted"], row["ttft_ms"]["p50"]) == (0, 2, None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "--url"),
        ("--url ftp://x", "ftp://x is no address"),
        ("--url http://x:port", "http://x:port"),
        ("--url http://127.0.0.1:1", "Connection refused"),
        ("--url x --concurrency 0", "--concurrency 0"),
        ("--url x --concurrency some", "--concurrency"),
        ("--url x --requests 0", "--requests 0"),
        ("--url x --abort-share 2", "--abort-share 2"),
        ("--url x --rate -1", "--rate -1"),
        ("--url x --timeout 0", "--timeout 0"),
        ("--url x --ttft-ms nan", "--ttft-ms nan"),
        ("--url x --prompts nowhere", "nowhere cannot be read"),
        ("--url x --api-key \u00e4", "ASCII"),
        ("--url x --concurrency 100000000 --requests 100000000", "open files"),
        ("--url x --out /dev/null/there", "cannot be made"),
    ],
)
def test_what_cannot_be(words: str, says: str) -> None:
    done = here("bench", "serve", *words.split())
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert says in done.stderr
