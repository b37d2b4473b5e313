"""Clients that send what they like, or nothing, and take nothing: they get an error or lose their connection, and the
others go on."""

from __future__ import annotations

import contextlib
import json
import random
import socket
from typing import Any

import pytest

from pipeinfer.serve import bodies, connection
from pipeinfer.serve import server as serving
from pipeinfer.serve.server import Server
from tests.unit.scripted_engine import HANG_S, Scripted, address, asked, completed, served, told

BODY = {
    "prompt": "x", "n": 1, "temperature": 0.5, "seed": 5, "stop": ["a"], "logprobs": 0, "stream": False, "user": "me",
    "logit_bias": {"5": 1}, "max_tokens": 4, "priority": 1, "echo": False, "top_k": 4, "stream_options": None,
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 2**63, 2**64, 10**400, 1e308, -0.0, 1.5, "", "x", "\ud800", "\0", [], [[]], [1], ["a"],
    [None], {}, {"a": 1}, {"": {}}, [{"role": "user"}], "a" * 5000,
]  # fmt: skip


def wire(server: Server, receive_nbytes: int | None = None) -> socket.socket:
    host, port = address(server).split(":")
    client = socket.socket()
    client.settimeout(HANG_S)
    if receive_nbytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_nbytes)
    client.connect((host, int(port)))
    return client


def rest(client: socket.socket) -> bytes:
    """Everything up to the end of the connection, however it ends."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(1 << 16):
            found += part
    return found


def head(*lines: str, path: str = "/v1/completions") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def is_well(server: Server) -> bool:
    return bool(completed(server, prompt="x")["choices"][0]["text"] == "ab")


def test_what_is_not_http_is_told_so() -> None:
    with served(Scripted(is_brief=True)) as server:
        for data in (b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00" * 9, b"GET / HTTP/1.1\r\nbad header\r\n\r\n"):
            with wire(server) as client:
                client.sendall(data)
                first, _, body = rest(client).partition(b"\r\n\r\n")
            assert first.startswith(b"HTTP/1.1 400")
            assert json.loads(body)["error"]["type"] == "invalid_request_error"
        with wire(server) as client:
            client.sendall(b"GET / HTTP/1.1\r\nx: ")
            with contextlib.suppress(ConnectionError):
                client.sendall(b"y" * (1 << 20))
            assert rest(client)[:12] in (b"HTTP/1.1 400", b"")
        assert is_well(server)


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes(seed: int) -> None:
    draw = random.Random(seed)
    request = head("Content-Length: 17", "Transfer-Encoding: chunked") + b'{"prompt": "x"}\r\n'
    with served(Scripted(is_brief=True)) as server:
        for _ in range(40):
            data = bytearray(request)
            for _ in range(draw.randrange(1, 9)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            with wire(server) as client:
                client.sendall(data[: draw.randrange(len(data))])
                client.shutdown(socket.SHUT_WR)
                answer = rest(client)
            assert not answer.startswith(b"HTTP/1.1 5"), (seed, bytes(data), answer)
        assert is_well(server)


@pytest.mark.parametrize("seed", range(4))
def test_odd_values_of_every_field(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is in a body, the answer is the tokens or an error of the client's."""
    draw = random.Random(seed)
    names = [*BODY, "messages", "tools", "response_format", "best_of", "unheard_of"]
    paths = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
    with served(Scripted(is_brief=True), max_queue=128) as server:
        for _ in range(60):
            body: Any = dict(BODY)
            for name in draw.sample(names, draw.randrange(1, 4)):
                body[name] = draw.choice(ODD)
            if draw.random() < 0.3:
                body = {"messages": draw.choice(ODD), "tokens": draw.choice(ODD)}
            response = asked(server, draw.choice(paths), body)
            status, answer = response.status, response.read()
            response.close()
            assert status in (200, 400, 404, 422), (seed, body, answer)
            if status != 200:
                assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
    assert "unforeseen" not in capsys.readouterr().err


def test_a_long_body_is_refused_before_it_is_sent() -> None:
    with served(Scripted(is_brief=True)) as server:
        for nbytes in (1 << 30, 10**18):
            with wire(server) as client:
                client.sendall(head(f"Content-Length: {nbytes}"))
                assert client.recv(1 << 16).startswith(b"HTTP/1.1 413")
        for path in ("/v1/completions", "/tokenize"):
            with wire(server) as client:
                client.sendall(head("Transfer-Encoding: chunked", path=path))
                chunk = b"10000\r\n" + b" " * (1 << 16) + b"\r\n"
                for _ in range(bodies.MAX_BODY_NBYTES // (1 << 16) + 1):
                    client.sendall(chunk)
                assert client.recv(1 << 16).startswith(b"HTTP/1.1 413")  # there is no last chunk
        assert is_well(server)


def test_a_body_that_goes_on_after_its_refusal_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "DRAIN_S", 0.05)
    monkeypatch.setattr(connection, "DRAIN_NBYTES", 1 << 20)
    with served(Scripted(is_brief=True)) as server, wire(server) as client:
        client.sendall(head(f"Content-Length: {1 << 30}"))
        with pytest.raises(ConnectionError):
            client.sendall(b" " * (1 << 28))


def test_a_body_after_a_refusal_of_the_head_is_passed_over() -> None:
    with served(Scripted(is_brief=True)) as server, wire(server) as client:
        data = b'{"prompt": "x"}'
        client.sendall(head(f"Content-Length: {len(data)}", path="/nowhere"))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 404")
        client.sendall(data + head(f"Content-Length: {len(data)}", "Connection: close") + data)
        assert b"HTTP/1.1 200" in rest(client)


@pytest.mark.parametrize("part", [b"", b"POST /v1/compl", head("Content-Length: 5")[:-2]])
def test_a_head_that_does_not_come_ends_the_connection(part: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_S", 0.05)
    with served(Scripted(is_brief=True)) as server, wire(server) as client:
        client.sendall(part)
        assert rest(client) == b""


def test_a_body_that_does_not_come_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_S", 0.05)
    monkeypatch.setattr(connection, "DRAIN_S", 0.05)
    with served(Scripted(is_brief=True)) as server, wire(server) as client:
        client.sendall(head("Content-Length: 50") + b'{"prompt"')
        assert rest(client).startswith(b"HTTP/1.1 408")


def test_a_client_that_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "TAKE_S", 0.05)
    engine = Scripted()
    with served(engine) as server, wire(server, receive_nbytes=4096) as client:
        data = json.dumps({"prompt": "x" * (1 << 20), "echo": True, "stream": True, "n": 64}).encode()
        client.sendall(head(f"Content-Length: {len(data)}") + data)
        assert engine.cancelled.acquire(timeout=HANG_S)
        engine.is_brief = True
        assert is_well(server)


def test_connections_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SPARE_CONNECTIONS", 2)
    with served(Scripted(is_brief=True), max_queue=2) as server:
        idle = [wire(server) for _ in range(4)]
        while len(server._uvicorn.server_state.connections) < 4:
            pass
        response = asked(server, "/v1/completions", {"prompt": "x"})
        assert response.headers["retry-after"] == "1"
        assert told(response)[0] == 503
        idle += [wire(server) for _ in range(8)]
        assert rest(idle[-1]) == b""
        for client in idle:
            client.close()
        while server._uvicorn.server_state.connections:
            pass
        assert is_well(server)
