"""The server's endpoints over real HTTP, with an engine that says what the test wants: bounds, errors, and ends."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeinfer.core.config import Config
from pipeinfer.core.errors import StallError
from pipeinfer.serve import bodies
from pipeinfer.serve.replies import TokenTexts
from pipeinfer.serve.server import ASKED, Server, listen
from tests.unit.scripted_engine import HANG_S, Scripted, address, asked, served, stream, told


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


def test_whoever_hears_that_it_is_served_is_served() -> None:
    class Heard(Exception):
        pass

    with served(None) as server:

        def announce() -> None:
            assert told(asked(server, "/health"))[0] == 200
            raise Heard

        with pytest.raises(Heard):
            server.serve(Scripted(), announce)  # type: ignore[arg-type]


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
        size = {"Content-Length": str(bodies.MAX_BODY_NBYTES + 1)}
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
    seeds = [settings.seed for settings in engine.settings]
    assert seeds[2:] == [7, 0]
    assert len(set(seeds)) == 4


def test_texts_of_tokens() -> None:
    """A decoder that drops the blank before the first word, and one for which a character has two tokens."""
    texts = TokenTexts(lambda tokens: "".join(f" {token}" for token in tokens).removeprefix(" "), 5)
    assert [texts.next(6), texts.next(7)] == [" 6", " 7"]
    texts = TokenTexts(lambda tokens: bytes(tokens).decode(errors="replace"), 65)
    assert [texts.next(0xC3), texts.next(0xA9), texts.next(66)] == ["\ufffd", "\ufffd", "B"]


@pytest.mark.slow
def test_the_first_chat_is_prepared(tmp_path: Path) -> None:
    """Where the tokenizer has a chat template, and nowhere else."""
    rendered = threading.Event()

    class Chatty(Scripted):
        config = Config(target=str(tmp_path))

        def tokenize_chat(self, messages: list[dict[str, str]]) -> list[int]:
            rendered.set()
            return super().tokenize_chat(messages)

    with served(Chatty()) as server:
        front = server._front
        front.warm_up(front.engine())
        assert front._warm is not None
        front._warm.result(HANG_S)
        front._submitting.submit(lambda: None).result(HANG_S)
        assert not rendered.is_set()
        (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
        front.warm_up(front.engine())
        assert rendered.wait(HANG_S)


def asked_only(server: Server, path: str, body: Any) -> http.client.HTTPConnection:
    """The connection of a request whose answer nobody has waited for."""
    connection = http.client.HTTPConnection(address(server), timeout=HANG_S)
    connection.request("POST", path, json.dumps(body))
    return connection


def test_chats_wait_for_what_they_need_and_completions_do_not() -> None:
    chat = {"messages": [{"role": "user", "content": "x"}]}
    with served(Scripted(is_brief=True), max_queue=9) as server, ThreadPoolExecutor() as pool:
        server._front._warm = warm = Future()
        given_up = asked_only(server, "/v1/chat/completions", chat)
        answers = [
            pool.submit(lambda path=path: told(asked(server, path, chat)))
            for path in ("/v1/chat/completions", "/tokenize")
        ]
        while server._front._places < 3:
            assert told(asked(server, "/v1/completions", {"prompt": "x"}))[0] == 200
        given_up.close()
        while server._front._places > 2:
            assert told(asked(server, "/v1/completions", {"prompt": "x"}))[0] == 200
        assert not any(answer.done() for answer in answers)
        warm.set_result(None)
        assert [answer.result(HANG_S)[0] for answer in answers] == [200, 200]


def test_what_is_sent_is_sent_at_once() -> None:
    """A stream's first piece does not wait for the acknowledgement of the response's head."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
