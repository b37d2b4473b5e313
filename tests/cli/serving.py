"""`pipeinfer serve` as a process with ranks of its own, and a client of it."""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cli.run import ROOT

HANG_S = 300.0
PROMPT = "def read_lines(path):\n"
KEY = "secret"
READY = re.compile(r"pipeinfer: (.*) is served at http://(127\.0\.0\.1:\d+)\n")


class Client:
    """Talks to the server at ``address``, which serves ``model``; ``process``: the server. ``mark`` is in the
    environment of all its processes."""

    def __init__(self, process: subprocess.Popen[str], model: str, address: str, mark: str) -> None:
        self.process, self.model, self.address, self.mark = process, model, address, mark

    def open(self, path: str, body: Any = None, key: str | None = KEY) -> http.client.HTTPResponse:
        """The answer's head; whoever closes it closes the connection."""
        connection = http.client.HTTPConnection(self.address, timeout=HANG_S)
        headers = {"Connection": "close"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, data, headers)
        return connection.getresponse()

    def ask(self, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
        with self.open(path, body, key) as response:
            return response.status, json.loads(response.read())

    def complete(self, prompt: Any = PROMPT, **more: Any) -> Any:
        status, answer = self.ask("/v1/completions", {"prompt": prompt, "ignore_eos": True, **more})
        assert status == 200, answer
        return answer

    def text(self, **more: Any) -> str:
        return str(self.complete(**more)["choices"][0]["text"])


def events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The chunks of a stream up to its end, which must be as OpenAI has it."""
    while (line := response.readline()) != b"data: [DONE]\n":
        assert line.startswith(b"data: "), line
        yield json.loads(line.removeprefix(b"data: "))
        assert response.readline() == b"\n"


def marked(mark: str) -> list[str]:
    """The processes with ``mark`` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append(process.name)
        except OSError:
            continue
    return found


def terminate(client: Client) -> None:
    """Send SIGTERM while a request is served, and take the rest of the answer."""
    body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with client.open("/v1/completions", body) as response:
        chunks = events(response)
        next(chunks)
        client.process.terminate()
        *_, last = chunks
    assert last["choices"][0]["finish_reason"] == "length"


@contextmanager
def serving(*arguments: str) -> Iterator[Client]:
    """A server on a free port. At SIGTERM it lets the request under way end, exits with 0, and leaves no rank."""
    mark = uuid.uuid4().hex
    line = [sys.executable, "-m", "pipeinfer", "serve", "--port", "0", "--ranks", "2", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PIPEINFER_API_KEY": KEY, "MARK": mark}
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    with subprocess.Popen(line, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:

        def read() -> None:
            assert process.stderr is not None
            for said in process.stderr:
                lines.put(said)
            lines.put("")

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            said = []
            while not (ready := READY.fullmatch((said or [""])[-1])):
                said.append(lines.get(timeout=HANG_S))
                assert said[-1], said
            assert len(marked(mark)) >= 3
            client = Client(process, ready[1], ready[2], mark)
            yield client
            terminate(client)
            assert process.wait(HANG_S) == 0
            assert not marked(mark)
        finally:
            process.kill()
            reader.join(HANG_S)
