"""A real HTTP server, with an engine that says what the test wants."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

from launch.requests import OnOutput, RequestOutput
from pipeinfer.core.config import BUILTIN, Config
from pipeinfer.core.errors import UserError
from pipeinfer.core.messages import TopToken
from pipeinfer.core.ports import GREEDY, Request, RequestStats, Sampling
from pipeinfer.engine.answer import Completion, Handle
from pipeinfer.serve.server import Server

HANG_S = 60.0


def counted(drafted: int, accepted: int, corrections: int, histogram: list[int]) -> RequestStats:
    """Statistics; ``histogram``: steps by their accepted tokens, where the engine counts them."""
    has_histogram = any(member.name == "acceptance_histogram" for member in fields(RequestStats))
    more: dict[str, Any] = {"acceptance_histogram": histogram} if has_histogram else {}
    return RequestStats(drafted=drafted, accepted=accepted, corrections=corrections, **more)


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
    """An engine and its job: a request says ``ab`` at once, and ends when it is cancelled or when the test says so.
    ``is_brief``: it ends at once, as one does that wants no new token. Each token of a prompt has -1/8 of its number as
    log-probability."""

    is_threaded, context, sampling = True, 100, GREEDY
    ranks: list[dict[str, Any]] = []  # noqa: RUF012
    failure: BaseException | None = None
    config = Config(target=BUILTIN)
    stats = counted(4, 1, 2, [0, 1])

    def __init__(self, is_brief: bool = False) -> None:
        self.is_brief = is_brief
        self.settings: list[Sampling] = []
        self.priorities: list[int] = []
        self.cancelled = threading.Semaphore(0)
        self._outputs: list[OnOutput] = []

    def tokenize(self, prompt: Any, max_new_tokens: int) -> list[int]:
        if prompt == "boom":
            raise RuntimeError("a defect")
        tokens = [ord(letter) for letter in prompt] if isinstance(prompt, str) else prompt
        if not all(0 <= token < 256 for token in tokens):
            raise UserError("no such token")
        return tokens

    def tokenize_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise UserError("the template wants a question first")
        return [ord(letter) for letter in messages[-1]["content"]]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))

    def submit(
        self,
        prompt: list[int],
        max_new_tokens: int,
        ignore_eos: bool,
        sampling: Sampling,
        stop: Any = (),
        watch: Any = None,
        priority: int = 0,
    ) -> Any:
        self.settings.append(sampling)
        self.priorities.append(priority)
        request = Request(tuple(prompt), max_new_tokens, sampling=sampling)
        return Handle(Job(self), request, Letters(), Completion(prompt_tokens=prompt), watch)  # type: ignore[arg-type]

    def end(self, number: int, reason: str = "length") -> None:
        stats = replace(self.stats)
        self._outputs[number](RequestOutput(2.0, reason=reason, stats=stats, number=number))

    def emit(self, number: int, text: str) -> None:
        """Have request ``number`` say more."""
        tokens = tuple(map(ord, text))
        output = RequestOutput(2.0, tokens, logps=(-1.0,) * len(tokens), number=number, load=(3, 1, 0.25))
        self._outputs[number](output)

    def fail(self, number: int, error: BaseException) -> None:
        self._outputs[number](RequestOutput(2.0, reason="error", number=number, error=error))


class Job:
    """What a Handle has of the engine."""

    is_threaded, ranks = True, Scripted.ranks

    def __init__(self, engine: Scripted) -> None:
        self._engine = engine

    def submit(self, request: Request, on_output: OnOutput) -> int:
        number = len(self._engine._outputs)
        self._engine._outputs.append(on_output)
        on_output(RequestOutput(0.0, number=number))
        if (tops := request.sampling.prompt_logprobs) is not None:
            for token in request.prompt[1:]:
                best = tuple(TopToken(98 + index, -0.25) for index in range(tops))
                on_output(RequestOutput(0.5, logps=(-token / 8,), tops=(best,), number=number, is_of_prompt=True))
        if not request.max_new_tokens:
            self._engine.end(number)
            return number
        on_output(RequestOutput(1.0, (97,), logps=(-0.5,), number=number, load=(3, 1, 0.25)))
        on_output(RequestOutput(1.5, (98,), logps=(-1.5,), number=number, load=(3, 1, 0.25)))
        if self._engine.is_brief:
            self._engine.end(number)
        return number

    def cancel(self, number: int) -> None:
        self._engine.end(number, "aborted")
        self._engine.cancelled.release()

    def wait(self, changed: threading.Condition, ready: Callable[[], bool], timeout_s: float | None = None) -> bool:
        return changed.wait_for(ready, HANG_S)


@contextmanager
def served(engine: Scripted | None, max_queue: int = 2, api_key: str | None = None) -> Iterator[Server]:
    """A server; ``engine`` None: one that still loads."""
    with Server("127.0.0.1", 0, "mine", api_key, max_queue, 0.0) as server:
        server.start()
        if engine is not None:
            server._front.open(engine)  # type: ignore[arg-type]
        yield server


def address(server: Server) -> str:
    return server.url.removeprefix("http://")


def asked(
    server: Server, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> http.client.HTTPResponse:
    """The answer's head; whoever closes it closes the connection."""
    connection = http.client.HTTPConnection(address(server), timeout=HANG_S)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, data, {"Connection": "close"} | (headers or {}))
    return connection.getresponse()


def told(response: http.client.HTTPResponse) -> tuple[int, Any]:
    with response:
        return response.status, json.loads(response.read())


def completed(server: Server, chat: bool = False, **body: Any) -> Any:
    """A whole answer."""
    path = "/v1/chat/completions" if chat else "/v1/completions"
    status, answer = told(asked(server, path, body))
    assert status == 200, answer
    return answer


def chunks(server: Server, path: str = "/v1/completions", **body: Any) -> list[Any]:
    """All chunks of a stream."""
    with asked(server, path, {"stream": True, **body}) as response:
        assert response.status == 200
        *found, done, end = response.read().decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in found]


def stream(server: Server, **more: Any) -> http.client.HTTPResponse:
    """A stream of which the first chunks have come."""
    response = asked(server, "/v1/completions", {"prompt": "x", "stream": True, **more})
    assert response.status == 200
    for letter in "ab":
        assert json.loads(response.readline().removeprefix(b"data: "))["choices"][0]["text"] == letter
        response.readline()
    return response


def is_watched() -> bool:
    """Whether a handle that is awaited passes on what the job tells, as one that is iterated does."""
    seen: list[RequestOutput] = []

    async def take() -> None:
        await Scripted(is_brief=True).submit([120], 9, False, GREEDY, watch=seen.append)

    asyncio.run(take())
    return bool(seen)
