"""One streaming request to a server of OpenAI's interface: what came, when, and how it ended."""

from __future__ import annotations

import contextlib
import json
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeinfer.bench.serve_http import Address, Connection, Events, HttpError, request

MOST_ERROR_NBYTES = 1 << 16
MOST_SHOWN = 200  # characters of a server's message


@dataclass(slots=True)
class Outcome:
    """What became of request ``index``, which asked for text ``key``. Times in seconds on the monotonic clock: when it
    was due, when its first text came (0: none did), and when it ended. ``gaps_s``: times between chunks with text.
    ``tokens`` and ``prompt_tokens``: what the server's usage says, or None. ``error``: why there is no whole answer."""

    index: int
    key: int
    due_at: float
    first_at: float = 0.0
    ended_at: float = 0.0
    gaps_s: array[float] = field(default_factory=lambda: array("d"))
    chunks: int = 0
    tokens: int | None = None
    prompt_tokens: int | None = None
    text: str = ""
    finish_reason: str = ""
    error: str = ""
    is_aborted: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the answer came to its end."""
        return not (self.error or self.is_aborted)

    @property
    def new_tokens(self) -> int:
        """Tokens of the answer; chunks with text, if the server does not say."""
        return self.chunks if self.tokens is None else self.tokens


class Client:
    """Sends requests to ``address``, over connections that are kept for the next ones. ``timeout_s``: how long the
    server may be silent."""

    def __init__(self, address: Address, api_key: str | None, is_chat: bool, timeout_s: float) -> None:
        self._address, self._api_key, self._is_chat, self._timeout_s = address, api_key, is_chat, timeout_s
        self._path = "/v1/chat/completions" if is_chat else "/v1/completions"
        self._idle = list[Connection]()

    def close(self) -> None:
        """Close all connections."""
        while self._idle:
            self._idle.pop().close()

    async def models(self) -> list[str]:
        """The ids of the server's models. Raises HttpError."""
        connection = await Connection.open(self._address, self._timeout_s)
        try:
            connection.send(request(self._address, "GET", "/v1/models", b"", self._api_key))
            status, headers = await connection.head()
            data = await _limited(connection, headers)
        finally:
            connection.close()
        if status != 200:
            raise HttpError(_reason(status, data))
        try:
            return [str(model["id"]) for model in json.loads(data)["data"]]
        except (ValueError, KeyError, TypeError):
            raise HttpError("the server's list of models is none") from None

    async def ask(self, body: Mapping[str, Any], outcome: Outcome, abort_after: int | None = None) -> None:
        """Send the request and take its stream. ``abort_after``: close the connection after so many chunks with text,
        with 0 right after sending; an answer that ends before is whole. Errors of server and network are in
        ``outcome``."""
        data = request(self._address, "POST", self._path, json.dumps(body).encode(), self._api_key)
        connection = None
        try:
            connection, status, headers = await self._send(data, outcome, abort_after)
            if not outcome.is_aborted and status != 200:
                outcome.error = _reason(status, await _limited(connection, headers))
            elif not outcome.is_aborted:
                await self._take(connection, headers, outcome, abort_after)
        except HttpError as error:
            outcome.error = str(error)
        finally:
            outcome.ended_at = time.monotonic()
            if connection is not None:
                if connection.is_open and outcome.is_whole:
                    self._idle.append(connection)
                else:
                    connection.close()

    async def _send(
        self, data: bytes, outcome: Outcome, abort_after: int | None
    ) -> tuple[Connection, int, dict[str, str]]:
        """Send ``data`` and await the head of the answer. A kept connection may have been closed by the server
        meanwhile; then a new one is tried."""
        while True:
            connection = self._idle.pop() if self._idle else await Connection.open(self._address, self._timeout_s)
            if not connection.is_open:
                connection.close()
                continue
            connection.send(data)
            if abort_after == 0:
                outcome.is_aborted = True
                return connection, 0, {}
            try:
                return connection, *await connection.head()
            except HttpError:
                connection.close()
                if not connection.is_used:
                    raise
            except BaseException:
                connection.close()
                raise

    async def _take(
        self, connection: Connection, headers: dict[str, str], outcome: Outcome, abort_after: int | None
    ) -> None:
        """Take the stream to its end."""
        stream, last_at, pieces = Events(), 0.0, list[str]()
        is_done = False
        async with contextlib.aclosing(connection.body(headers)) as parts:
            async for part in parts:
                now = time.monotonic()
                for data in stream.feed(part):
                    is_done = is_done or data == b"[DONE]"
                    piece = "" if is_done else self._read(data, outcome)
                    if not piece:
                        continue
                    if outcome.chunks:
                        outcome.gaps_s.append(now - last_at)
                    else:
                        outcome.first_at = now
                    last_at = now
                    outcome.chunks += 1
                    pieces.append(piece)
                    outcome.is_aborted = outcome.chunks == abort_after
                    if outcome.is_aborted:
                        break
                if outcome.is_aborted or outcome.error:
                    break
        outcome.text = "".join(pieces)
        if not (is_done or outcome.error or outcome.is_aborted):
            outcome.error = "the stream ended without [DONE]"

    def _read(self, data: bytes, outcome: Outcome) -> str:
        """The text in a chunk; what else it says goes to ``outcome``."""
        try:
            chunk = json.loads(data)
            if chunk.get("error"):
                outcome.error = _shortened(str(chunk["error"].get("message", chunk["error"])))
                return ""
            if usage := chunk.get("usage"):
                outcome.tokens, outcome.prompt_tokens = int(usage["completion_tokens"]), int(usage["prompt_tokens"])
            if not chunk["choices"]:
                return ""
            choice = chunk["choices"][0]
            outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
            if not self._is_chat:
                return choice["text"] or ""
            delta = choice["delta"]
            return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            outcome.error = f"not a chunk of a stream: {data[:80]!r}"
            return ""


async def _limited(connection: Connection, headers: dict[str, str]) -> bytes:
    """The body of an answer that is no stream."""
    data = b""
    async for part in connection.body(headers):
        data += part
        if len(data) > MOST_ERROR_NBYTES:
            raise HttpError("the server's answer is too long")
    return data


def _reason(status: int, data: bytes) -> str:
    """What an answer with another status than 200 says."""
    try:
        error = json.loads(data)
        error = error.get("error", error)
        told = error.get("message") if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        told = data.decode(errors="replace")
    return _shortened(f"HTTP {status}: {told}")


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_SHOWN else line[:MOST_SHOWN] + "..."
