"""The load client over real sockets, with servers that misbehave; and what it makes of its outcomes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from array import array
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from pipeinfer.bench.serve_client import Client, Outcome
from pipeinfer.bench.serve_http import Address, Events, HttpError, _Chunked, _Counted
from pipeinfer.bench.serve_load import Load, apply, prepare
from pipeinfer.bench.serve_measures import Objectives, is_good, measure
from pipeinfer.bench.serve_repeats import Repeats
from pipeinfer.core.errors import UserError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LOAD = Load(["one", "two", "three"], requests=6, concurrency=2, max_tokens=8, distinct=5, model="m")
Behaviour = Callable[[int, dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x;ext=1\r\n%s\r\n" % (len(data), data)


def event(said: Any) -> bytes:
    return b"data: " + (said if isinstance(said, bytes) else json.dumps(said).encode()) + b"\n\n"


def text(piece: str) -> bytes:
    return event({"choices": [{"text": piece, "finish_reason": None}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}})
DONE = event(b"[DONE]")


def with_server(behaviour: Behaviour, use: Callable[[Client], Awaitable[Any]]) -> Any:
    """The result of ``use`` with a client of a server that calls ``behaviour`` for each request, numbered from 0."""
    asked, writers = [0], list[asyncio.StreamWriter]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")), 0)
                body = json.loads(await reader.readexactly(length) or b"{}")
                asked[0] += 1
                await behaviour(asked[0] - 1, body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def both() -> Any:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = Client(Address("127.0.0.1", server.sockets[0].getsockname()[1], False, ""), None, False, 60.0)
        try:
            return await use(client)
        finally:
            client.close()
            server.close()
            for writer in writers:
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    return asyncio.run(both())


def outcome_of(*sent: bytes, abort_after: int | None = None, closes: bool = False) -> Outcome:
    """What a client makes of these bytes."""

    async def behave(number: int, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        for part in sent:
            writer.write(part)
            await writer.drain()
        if closes:
            writer.close()

    async def use(client: Client) -> Outcome:
        outcome = Outcome(0, 0, 0.0)
        await client.ask({"prompt": "x"}, outcome, abort_after)
        return outcome

    found = with_server(behave, use)
    assert isinstance(found, Outcome)
    return found


def test_a_stream_in_any_pieces() -> None:
    whole = b"".join((text("a"), text(""), text("bc"), USAGE, DONE))
    for seed in range(20):
        rng = random.Random(seed)
        cuts = sorted(rng.sample(range(1, len(whole)), 5))
        parts = [chunk(whole[a:b]) for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        data = HEAD + b"".join(parts) + b"0\r\n\r\n"
        cuts = sorted(rng.sample(range(1, len(data)), 5))
        found = outcome_of(*(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)))
        assert (found.text, found.chunks, found.error) == ("abc", 2, ""), seed
        assert (found.tokens, found.prompt_tokens, found.new_tokens) == (7, 3, 7), seed
        assert len(found.gaps_s) == 1 and 0 < found.first_at <= found.ended_at


def test_framings_keep_what_comes_after_the_body() -> None:
    data = chunk(b"ab") + chunk(b"c\n") + b"0\r\nTrailer: x\r\n\r\nHTTP/1.1"
    for size in range(1, len(data)):
        chunked, said = _Chunked(), b""
        for at in range(0, len(data), size):
            if chunked.is_over:
                chunked.rest += data[at : at + size]
            else:
                said += chunked.feed(data[at : at + size])
        assert (said, chunked.rest, chunked.is_over) == (b"abc\n", b"HTTP/1.1", True), size
    counted = _Counted(3)
    assert (counted.feed(b"ab"), counted.is_over, counted.feed(b"cde"), counted.rest) == (b"ab", False, b"c", b"de")
    for wrong in (b"zz\r\n", b"1\r\nabc\r\n"):
        with pytest.raises(HttpError, match="not HTTP"):
            _Chunked().feed(wrong)
    stream = Events()
    assert stream.feed(b": comment\r\ndata:1\r\n\r\nda") == [b"1"] and stream.feed(b"ta: 2\n") == [b"2"]


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ([b"HTTP/1.1 429 Too Many\r\nContent-Length: 26\r\n\r\n", b'{"error":{"message":"no"}}'], "HTTP 429: no"),
        ([b"HTTP/1.1 500 Oops\r\nConnection: close\r\n\r\n", b"some\nwords"], "HTTP 500: some words"),
        ([b"SSH-2.0-x\r\n\r\n"], "not HTTP"),
        ([b"HTTP/1.1 200 OK\r\n"], "without an answer"),
        ([HEAD, chunk(text("a"))], "before the end"),
        ([HEAD, chunk(text("a")), b"0\r\n\r\n"], "without [DONE]"),
        ([HEAD, chunk(event({"error": {"message": "broken"}})), chunk(DONE), b"0\r\n\r\n"], "broken"),
        ([HEAD, chunk(event([1])), b"0\r\n\r\n"], "not a chunk"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", b"{}"], "without [DONE]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_goes_wrong_is_told(sent: list[bytes], says: str) -> None:
    found = outcome_of(*sent, closes=True)
    assert says in found.error and not found.is_whole


def test_a_server_that_is_silent_is_not_waited_for() -> None:
    async def behave(number: int, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk(text("a")))

    async def use(client: Client) -> Outcome:
        client._timeout_s = 0.05
        await client.ask({}, outcome := Outcome(0, 0, 0.0))
        return outcome

    assert with_server(behave, use).error == "the server was silent for 0.05 s"


def test_a_kept_connection_that_the_server_has_closed_is_replaced() -> None:
    async def behave(number: int, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if number == 1:
            writer.close()  # instead of an answer
        else:
            writer.write(HEAD + chunk(text("a") + DONE) + b"0\r\n\r\n")

    async def use(client: Client) -> list[Outcome]:
        outcomes = [Outcome(index, 0, 0.0) for index in range(2)]
        for outcome in outcomes:
            await client.ask({}, outcome)
        return outcomes

    assert [one.error for one in with_server(behave, use)] == ["", ""]


def test_aborted_after_so_many_chunks() -> None:
    sent = [HEAD, *(chunk(text(letter)) for letter in "abcd"), chunk(DONE), b"0\r\n\r\n"]
    for after, said in [(0, ""), (1, "a"), (3, "abc")]:
        found = outcome_of(*sent, abort_after=after)
        assert (found.text, found.is_aborted, found.is_whole, found.error) == (said, True, False, "")
    assert outcome_of(*sent, abort_after=7).is_whole


def test_a_server_without_usage() -> None:
    bodies: list[dict[str, Any]] = []

    async def behave(number: int, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        bodies.append(body)
        if "stream_options" in body:
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 5\r\n\r\nwhat?")
        else:
            writer.write(HEAD + chunk(text("a") + text("b") + DONE) + b"0\r\n\r\n")

    async def use(client: Client) -> Any:
        load, outcomes = await prepare(LOAD, client), list[Outcome]()
        times = await apply(load, client, outcomes.append)
        return measure(load, outcomes, times, Objectives())

    row = with_server(behave, use)
    assert (row["completed"], row["tokens_by"], row["output_tokens"], row["input_tokens"]) == (6, "chunks", 12, None)
    assert [body["prompt"] for body in bodies[2:]] == ["one", "two", "three", "# 1\none", "# 1\ntwo", "one"]
    assert all(body["max_tokens"] == 8 and body["stream"] for body in bodies)


def test_a_server_that_answers_nothing_is_refused() -> None:
    async def behave(number: int, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")

    with pytest.raises(UserError, match="HTTP 503"):
        with_server(behave, lambda client: prepare(LOAD, client))


def test_a_load_follows_from_its_seed() -> None:
    many = Load(["x"], 4000, 1, 50, 1, rate=20.0, seed=7, abort_share=0.1, temperature=0.5)
    times = list(many.due())
    assert times == list(many.due()) and times == sorted(times) and times[0] == 0
    assert 180 < times[-1] < 220
    after = [many.abort_after(index) for index in range(4000)]
    aborted = [count for count in after if count is not None]
    assert 300 < len(aborted) < 500 and set(aborted) == set(range(50))
    assert many.body(3)["seed"] == 10
    assert list(LOAD.due()) == [0] * 6


def answered(due: float, first: float, gaps: list[float], tokens: int | None = None) -> Outcome:
    ended = first + sum(gaps)
    return Outcome(0, 0, due, first, ended, array("d", gaps), len(gaps) + 1, tokens)


def test_measures() -> None:
    outcomes = [answered(1.0, 1.5, [0.1, 0.3], 5), answered(2.0, 2.1, [0.2], 2), Outcome(2, 0, 0.0, error="why")]
    row = measure(LOAD, outcomes, (0.0, 2.0), Objectives(ttft_ms=200, tpot_ms=250))
    assert row["ttft_ms"]["p50"] == pytest.approx(300) and row["tpot_ms"]["p50"] == pytest.approx(150)
    assert row["itl_ms"]["p50"] == pytest.approx(200) and row["e2el_ms"]["p99"] == pytest.approx(894, abs=1)
    assert (row["output_throughput"], row["request_throughput"], row["goodput"]) == (3.5, 1.0, 0.5)
    assert (row["completed"], row["errors"], row["reasons"]) == (2, 1, {"why": 1})
    assert not is_good(outcomes[1], Objectives(tpot_ms=199)) and is_good(outcomes[1], Objectives())


@pytest.mark.parametrize(
    ("known", "new", "is_same"),
    [
        (("abc", True), ("abc", True), True),
        (("abc", True), ("abd", True), False),
        (("abc", True), ("ab", True), False),
        (("abc", True), ("ab", False), True),
        (("abc", True), ("abcd", False), False),
        (("ab", False), ("abc", True), True),
        (("abc", False), ("ab", True), False),
        (("abc", False), ("ab", False), True),
        (("ab", False), ("abc", False), True),
        (("ab", False), ("xbc", False), False),
        (("", False), ("abc", True), True),
    ],
)
def test_repeats(known: tuple[str, bool], new: tuple[str, bool], is_same: bool) -> None:
    repeats = Repeats()
    repeats.check(1, *known)
    repeats.check(2, "other", True)
    repeats.check(1, *new)
    assert (repeats.compared, repeats.differences) == (1, 0 if is_same else 1)
    assert bool(repeats.examples) != is_same
    longest = max(known, new, key=lambda one: (one[1], len(one[0]))) if is_same else known
    repeats.check(1, *longest)
    assert repeats.differences == (0 if is_same else 1)
