"""`pipeinfer batch` as a user runs it: the built-in pair, whole processes, files that outlive kills and signals."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.run import ROOT, here, pipeinfer

HANG_S = 300.0
PROMPTS = ["def read_lines(path):\n", "import os\n", "class Stack:\n", "def mean(values):\n", "for line in"]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def requests(count: int, tokens: int) -> list[Any]:
    bodies = [
        {"prompt": f"# {number}\n{PROMPTS[number % len(PROMPTS)]}", "max_tokens": tokens, "ignore_eos": True}
        for number in range(count)
    ]
    return [{"custom_id": f"r{number}", "url": "/v1/completions", "body": body} for number, body in enumerate(bodies)]


def answers(path: Path) -> list[Any]:
    """The lines of an output file, all of them whole."""
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.splitlines()]


def texts(path: Path) -> dict[str, str]:
    found = answers(path)
    told = {one["custom_id"]: one["response"]["body"]["choices"][0]["text"] for one in found}
    assert len(told) == len(found), "an id has two answers"
    return told


def started(source: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """A batch of few requests at a time, whose output file is looked at while it is written."""
    line = [sys.executable, "-m", "pipeinfer", "batch", str(source), "--out", str(out), "--concurrency", "2", *more]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], is_so: Callable[[], bool]) -> None:
    """Look now and then until it is so, for as long as the process lives."""
    while not is_so():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
            raise AssertionError(process.stderr.read() if process.stderr else "")


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_answers_are_those_of_run_and_in_openai_s_form(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": PROMPTS[0], "max_tokens": 20}, "", *requests(3, 12)])
    done = pipeinfer("batch", str(source), "--out", str(tmp_path / "out.jsonl"), "--ranks", "2")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    found = answers(tmp_path / "out.jsonl")
    assert {one["custom_id"] for one in found} == {"line-1", "r0", "r1", "r2"}
    assert all(one.keys() == {"id", "custom_id", "response", "error"} for one in found)
    assert all(one["response"]["status_code"] == 200 and one["error"] is None for one in found)
    assert len({one["id"] for one in found} | {one["response"]["request_id"] for one in found}) == 8
    told = texts(tmp_path / "out.jsonl")
    alone = here("run", "--prompt", PROMPTS[0], "--max-new-tokens", "20")
    assert told["line-1"] + "\n" == alone.stdout
    (body,) = [one["response"]["body"] for one in found if one["custom_id"] == "r0"]
    assert (body["object"], body["model"], body["usage"]["completion_tokens"]) == ("text_completion", "builtin", 12)
    assert "4 answered, 0 refused, 0 skipped" in done.stderr


@pytest.mark.slow
def test_bad_lines_are_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    good = {"custom_id": "good", "body": {"prompt": "x", "max_tokens": 3, "model": "default", "logprobs": 0}}
    long = {"custom_id": "long", "body": {"prompt": "x" * (5 << 20)}}
    bad: list[tuple[Any, str, str, str]] = [
        ("{", "line-1", "invalid_json_line", "not JSON"),
        ("[1]", "line-2", "invalid_json_line", "not a JSON object"),
        ("[" * 100_000, "line-3", "invalid_json_line", "not JSON"),
        ({"custom_id": "b"}, "b", "invalid_request", "no body"),
        ({"custom_id": 5, "body": {"prompt": "x"}}, "line-5", "invalid_request", "custom_id"),
        ({"custom_id": "c", "body": "x"}, "c", "invalid_request", "body must be an object"),
        ({"custom_id": "d", "body": {"prompt": "x", "wrong": 1}}, "d", "invalid_request", 'unknown field "wrong"'),
        ({"custom_id": "e", "body": {"prompt": "x"}, "more": 1}, "e", "invalid_request", 'unknown field "more"'),
        ({"custom_id": "f", "body": {"prompt": "x", "max_tokens": 5000}}, "f", "context_length_exceeded", "context"),
        ({"custom_id": "g", "url": "/v1/embeddings", "body": {"prompt": "x"}}, "g", "invalid_request", "url"),
        ({"custom_id": "h", "method": "GET", "body": {"prompt": "x"}}, "h", "invalid_request", "method"),
        ({"custom_id": "i", "body": {"prompt": "x", "model": "other"}}, "i", "model_not_found", "other"),
        ({"custom_id": "j", "body": {"prompt": "x", "stream": True}}, "j", "invalid_request", "stream"),
        ({"custom_id": "k", "body": {"messages": [{"role": "user", "content": "x"}]}}, "k", "invalid_request", "chat"),
        (good | {"custom_id": "f"}, "line-15", "duplicate_custom_id", '"f"'),
        (long, "line-16", "invalid_request", "longer than"),
    ]
    source = write(tmp_path / "in.jsonl", [*(line for line, *_ in bad), good])
    out = tmp_path / "out.jsonl"
    done = here("batch", str(source), "--out", str(out))
    assert done.returncode == 0, done.stderr
    *errors, last = answers(out)
    for number, (one, (_, custom_id, code, word)) in enumerate(zip(errors, bad, strict=True), 1):
        assert (one["custom_id"], one["error"]["code"], one["error"]["line"]) == (custom_id, code, number)
        assert word in one["error"]["message"] and one["error"]["message"].startswith(f"line {number}: ")
        assert one["response"]["status_code"] in (400, 404, 422)
        assert one["response"]["body"]["error"]["message"] in one["error"]["message"]
    assert last["custom_id"] == "good" and len(last["response"]["body"]["choices"][0]["logprobs"]["tokens"]) == 3
    before = out.read_bytes()
    again = here("batch", str(source), "--out", str(out))
    assert "0 answered, 0 refused, 17 skipped" in again.stderr
    assert out.read_bytes() == before


@pytest.mark.slow
def test_a_killed_batch_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed at a random line, and its last line torn at a random byte, several times over."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    source = write(tmp_path / "in.jsonl", requests(16, 16))
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert here("batch", str(source), "--out", str(whole)).returncode == 0
    had = 0
    for _ in range(2):
        wanted = rng.randint(had + 1, 14)
        with started(source, out) as process:
            wait_for(process, lambda wanted=wanted: lines_in(out) >= wanted)  # type: ignore[misc]
            process.kill()
        had = len(answers(out))
        assert wanted <= had
        if had >= 14:
            break
    data = out.read_bytes()
    last = data[data[:-1].rfind(b"\n") + 1 :]
    out.write_bytes(data + last[: rng.randint(1, len(last) - 1)])
    done = here("batch", str(source), "--out", str(out), "--concurrency", "3")
    assert f"{16 - had} answered, 0 refused, {had} skipped" in done.stderr, done.stderr
    assert out.read_bytes().startswith(data)
    assert texts(out) == texts(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "ranks"), [("SIGTERM", 1), ("SIGUSR1", 2), ("SIGINT", 1)])
def test_a_signal_ends_it_between_lines(signum: str, ranks: int, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", requests(200, 24)), tmp_path / "out.jsonl"
    with started(source, out, "--ranks", str(ranks)) as process:
        wait_for(process, lambda: lines_in(out) >= 2)
        for _ in range(2):  # launchers and batch systems repeat themselves
            process.send_signal(getattr(signal, signum))
        _, said = process.communicate(timeout=HANG_S)
    assert process.returncode == 128 + getattr(signal, signum)
    assert f"ended by {signum}, the same command goes on from here\n" in said
    found = answers(out)
    assert 2 <= len(found) < 200
    assert all(one["response"]["body"]["usage"]["completion_tokens"] == 24 for one in found)
    with started(source, out, "--ranks", str(ranks)) as process:
        wait_for(process, lambda: lines_in(out) > len(found))
        process.kill()


@pytest.mark.slow
def test_more_at_once_answer_the_same(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", requests(7, 10))
    told = []
    for concurrency in ("1", "3", "50"):
        out = tmp_path / f"{concurrency}.jsonl"
        done = here("batch", str(source), "--out", str(out), "--concurrency", concurrency)
        assert done.returncode == 0, done.stderr
        told.append(texts(out))
        if concurrency == "1":
            assert list(told[0]) == [f"r{number}" for number in range(7)]
    assert told[0] == told[1] == told[2]


def refused(*arguments: str, says: str) -> None:
    done = here("batch", *arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert says in done.stderr


def test_what_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    source, out = str(write(tmp_path / "in.jsonl", requests(1, 4))), tmp_path / "out.jsonl"
    refused(source, "--out", source, says="is the input")
    (tmp_path / "link").symlink_to(source)
    refused(source, "--out", str(tmp_path / "link"), says="is the input")
    refused(str(tmp_path / "none"), "--out", str(out), says="none cannot be read")
    refused(str(tmp_path), "--out", str(out), says="cannot be read (Is a directory)")
    refused(source, "--out", str(tmp_path / "no/where"), says="cannot be written (No such file")
    refused(source, "--out", str(tmp_path), says="cannot be written (Is a directory)")
    refused(source, "--out", "/dev/null", says="no regular file")
    refused(source, "--out", str(out), "--concurrency", "0", says="--concurrency 0")
    refused(source, "--out", str(out), "--served-model-name", "", says="--served-model-name")
    refused(source, "--out", str(out), "--target", "/no/such", says="/no/such")
    assert not out.exists()
    for held in ("some text\n", "some text", '{"id": 3}\n', '{"id":"batch_req_1","custom_id":"a"}\n'):
        out.write_text(held)
        refused(source, "--out", str(out), says="holds no answers of a batch (line 1)")
        assert out.read_text() == held


@pytest.mark.slow
def test_with_an_mpi_that_grants_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is then driven by whoever waits for an answer, as in a rank of such a job."""
    from launch.head import LocalJob

    source = write(tmp_path / "in.jsonl", [*requests(5, 10), {"prompt": ""}])
    assert here("batch", str(source), "--out", str(tmp_path / "threads.jsonl")).returncode == 0
    monkeypatch.setattr("pipeinfer.engine.engine.lead_job", lambda job, world=None: LocalJob(job, is_threaded=False))
    done = here("batch", str(source), "--out", str(tmp_path / "none.jsonl"), "--concurrency", "3")
    assert done.returncode == 0, done.stderr
    assert "5 answered, 1 refused, 0 skipped" in done.stderr
    told = [answers(tmp_path / f"{name}.jsonl") for name in ("threads", "none")]
    good = [
        {one["custom_id"]: one["response"]["body"]["choices"] for one in found if not one["error"]} for found in told
    ]
    assert good[0] == good[1] and len(good[0]) == 5
