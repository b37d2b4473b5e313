"""The server's endpoints over real HTTP, with an engine that says what the test wants: bounds, errors, and ends."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from launch.requests import OnOutput, RequestOutput
from pipeinfer.core.errors import StallError
from pipeinfer.core.ports import GREEDY, Request, RequestStats, Sampling
from pipeinfer.engine.answer import Completion, Handle
from pipeinfer.serve import api
from pipeinfer.serve.replies import TokenTexts
from pipeinfer.serve.server import ASKED, Server

HANG_S = 60.0


class Letters:
    """A reader for which a token is a letter."""

    shown, is_stopped = "", False

    def read(self, tokens: tuple[int, ...]) -> tuple[int, str]:
        piece = "".join(map(chr, tokens))
        self.shown += piece
        return len(tokens), piece

    def close(self) -> str:
        return ""


class Scripted:
    """An engine and its job: a request says ``ab`` at once, and ends when it is cancelled or when the test says so."""

    is_threaded, context, sampling = True, 100, GREEDY
    ranks: list[dict[str, Any]] = []  # noqa: RUF012
    failure: BaseException | None = None

    def __init__(self) -> None:
        self.settings: list[Sampling | None] = []
        self.cancelled = threading.Semaphore(0)
        self._outputs: dict[int, OnOutput] = {}

    def tokenize(self, prompt: Any, max_new_tokens: int) -> list[int]:
        if prompt == "boom":
            raise RuntimeError("a defect")
        return [ord(letter) for letter in prompt] if isinstance(prompt, str) else prompt

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))

    def submit(self, prompt: Any, *others: Any, sampling: Sampling | None = None, stop: Any = ()) -> Any:
        if isinstance(prompt, Request):  # the job's
            number = len(self._outputs)
            self._outputs[number] = others[0]
            others[0](RequestOutput(0.0, number=number))
            others[0](RequestOutput(1.0, (97, 98), logps=(-0.5, -1.5), number=number))
            return number
        self.settings.append(sampling)
        request = Request(tuple(prompt), 10)
        return Handle(self, request, Letters(), Completion(prompt_tokens=prompt))  # type: ignore[arg-type]

    def end(self, number: int, reason: str = "length") -> None:
        self._outputs[number](RequestOutput(2.0, reason=reason, stats=RequestStats(), number=number))

    def fail(self, number: int, error: BaseException) -> None:
        self._outputs[number](RequestOutput(2.0, reason="error", number=number, error=error))

    def cancel(self, number: int) -> None:
        self.end(number, "aborted")
        self.cancelled.release()

    def wait(self, changed: threading.Condition, ready: Callable[[], bool], timeout_s: float | None = None) -> bool:
        return changed.wait_for(ready, HANG_S)


@contextmanager
def served(engine: Scripted | None, max_queue: int = 2) -> Iterator[Server]:
    with Server("127.0.0.1", 0, "mine", None, max_queue, 0.0) as server:
        server.start()
        if engine is not None:
            server._front.open(engine)  # type: ignore[arg-type]
        yield server


def asked(
    server: Server, path: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None
) -> http.client.HTTPResponse:
    """The answer's head; whoever closes it closes the connection."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=HANG_S)
    data = None if body is None else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, data, {"Connection": "close"} | (headers or {}))
    return connection.getresponse()


def told(response: http.client.HTTPResponse) -> tuple[int, Any]:
    with response:
        return response.status, json.loads(response.read())


def stream(server: Server, **more: Any) -> http.client.HTTPResponse:
    """A stream of which the first chunk has come."""
    response = asked(server, "/v1/completions", {"prompt": "x", "stream": True, **more})
    assert response.status == 200
    assert json.loads(response.readline().removeprefix(b"data: "))["choices"][0]["text"] == "ab"
    response.readline()
    return response


def test_until_the_model_is_loaded_nothing_is_served() -> None:
    with served(None) as server:
        for path, body in (("/health", None), ("/v1/completions", {"prompt": "x"})):
            response = asked(server, path, body)
            assert response.headers["retry-after"] == "1"
            assert told(response)[0] == 503
        engine = Scripted()
        server._front.open(engine)  # type: ignore[arg-type]
        assert told(asked(server, "/health")) == (200, {"status": "ok"})
        engine.failure = StallError("rank 1 waits")
        assert told(asked(server, "/health"))[0] == 503


def test_the_queue_has_a_bound() -> None:
    engine = Scripted()
    with served(engine) as server, stream(server), stream(server):
        response = asked(server, "/v1/completions", {"prompt": "x"})
        assert response.headers["retry-after"] == "1"
        status, body = told(response)
        assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")


def test_a_client_that_leaves_cancels_its_request() -> None:
    engine = Scripted()
    with served(engine, max_queue=1) as server:
        stream(server).close()
        assert engine.cancelled.acquire(timeout=HANG_S)
        while not engine.settings[1:]:  # until the place is free
            asked(server, "/v1/completions", {"prompt": "x", "stream": True}).close()
        assert engine.cancelled.acquire(timeout=HANG_S)


def test_a_body_has_a_bound() -> None:
    with served(Scripted()) as server:
        size = {"Content-Length": str(api.MAX_BODY_NBYTES + 1)}
        assert told(asked(server, "/v1/completions", {}, size))[0] == 413


def test_an_error_in_the_middle_of_a_stream_is_its_last_event() -> None:
    engine = Scripted()
    with served(engine) as server, stream(server) as response:
        engine.fail(0, StallError("rank 1 waits"))
        error, _, done, *_ = response.read().splitlines()
        assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "rank 1 waits"
        assert done == b"data: [DONE]"


def test_what_runs_at_the_end_is_cancelled() -> None:
    engine = Scripted()
    with served(engine) as server, stream(server) as response:
        server._events.put(ASKED)  # as a second signal does
        server._end(HANG_S)
        assert b"shutting down" in response.read()
        assert not server._thread.is_alive()


def test_a_defect_is_reported_and_the_server_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with served(Scripted()) as server:
        assert told(asked(server, "/v1/completions", {"prompt": "boom"}))[0] == 500
        assert told(asked(server, "/health"))[0] == 200
    assert "RuntimeError: a defect" in capsys.readouterr().err


def test_unknown_addresses_and_methods() -> None:
    with served(Scripted()) as server:
        status, body = told(asked(server, "/v1/embeddings", {}))
        assert (status, body["error"]["type"]) == (404, "invalid_request_error")
        assert told(asked(server, "/v1/completions"))[0] == 405


def test_without_a_seed_each_sample_is_another_one() -> None:
    engine = Scripted()
    with served(engine) as server:
        for more in ({"temperature": 1}, {"temperature": 1}, {"temperature": 1, "seed": 7}, {}):
            stream(server, **more).close()
            assert engine.cancelled.acquire(timeout=HANG_S)
    seeds = [settings.seed for settings in engine.settings if settings is not None]
    assert seeds[2:] == [7, 0]
    assert len(set(seeds)) == 4


def test_texts_of_tokens() -> None:
    """A decoder that drops the blank before the first word, and one for which a character has two tokens."""
    texts = TokenTexts(lambda tokens: "".join(f" {token}" for token in tokens).removeprefix(" "), 5)
    assert [texts.next(6), texts.next(7)] == [" 6", " 7"]
    texts = TokenTexts(lambda tokens: bytes(tokens).decode(errors="replace"), 65)
    assert [texts.next(0xC3), texts.next(0xA9), texts.next(66)] == ["\ufffd", "\ufffd", "B"]
