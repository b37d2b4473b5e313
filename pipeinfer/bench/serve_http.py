"""A small HTTP/1.1 client on asyncio's streams, for many streaming requests at a time at little cost."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from pipeinfer.core.errors import PipeinferError, refuse

READ_NBYTES = 1 << 16
MOST_HEAD_NBYTES = 1 << 16
"""The longest head of a response, and the longest line between chunks."""


class HttpError(PipeinferError):
    """A server cannot be reached, closes too early, is silent for too long, or does not speak HTTP."""


NOT_HTTP = "the server's answer is not HTTP"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is. ``path`` comes before that of an endpoint."""

    host: str
    port: int
    is_tls: bool
    path: str

    @staticmethod
    def read(url: str) -> Address:
        """The address in ``url``, with or without /v1 at its end. Raises UserError for what is none."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            refuse(f"--url {url}: {error}", "use http://HOST:PORT")
        is_plain = url.isascii() and url.isprintable() and " " not in url and not (parts.query or parts.fragment)
        if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
            refuse(f"--url {url} is no address of a server", "use http://HOST:PORT")
        is_tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return Address(parts.hostname, port or (443 if is_tls else 80), is_tls, path)


class _Framing(Protocol):
    """Finds the body of one answer in what the connection brings."""

    is_over: bool
    rest: bytes  # what came after the body

    def feed(self, data: bytes) -> bytes:
        """The part of the body in ``data``. Raises HttpError."""
        ...


class _Counted:
    """A body of ``nbytes`` bytes."""

    rest = b""

    def __init__(self, nbytes: int) -> None:
        self._left = nbytes
        self.is_over = not nbytes

    def feed(self, data: bytes) -> bytes:
        """See _Framing."""
        part, self.rest = data[: self._left], data[self._left :]
        self._left -= len(part)
        self.is_over = not self._left
        return part


class _Chunked:
    """A body in chunks: a line with the size in hexadecimal digits, so many bytes, the end of the line; the last chunk
    is empty, and lines up to an empty one follow it."""

    def __init__(self) -> None:
        self.rest = b""
        self.is_over = False
        self._left = 0  # bytes of the chunk
        self._is_inside = self._is_last = False

    def feed(self, data: bytes) -> bytes:
        """See _Framing."""
        data, parts, at = self.rest + data, [], 0
        while not self.is_over:
            if self._left:
                part = data[at : at + self._left]
                parts.append(part)
                at, self._left = at + len(part), self._left - len(part)
                if self._left:
                    break
            end = data.find(b"\n", at)
            if end < 0:
                break
            self._line(data[at:end].strip())
            at = end + 1
        self.rest = data[at:]
        if len(self.rest) > MOST_HEAD_NBYTES and not self.is_over:
            raise HttpError(NOT_HTTP)
        return b"".join(parts)

    def _line(self, line: bytes) -> None:
        if self._is_last:
            self.is_over = not line
        elif self._is_inside:  # the end of a chunk
            self._is_inside = False
            if line:
                raise HttpError(NOT_HTTP)
        else:
            try:
                self._left = int(line.split(b";")[0], 16)
            except ValueError:
                raise HttpError(NOT_HTTP) from None
            self._is_inside, self._is_last = self._left > 0, self._left == 0


class Connection:
    """A connection, for one request after another. ``is_used``: whether it has had an answer already. ``timeout_s``:
    how long the server may be silent while it is waited for."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout_s: float) -> None:
        self._reader, self._writer, self._timeout_s = reader, writer, timeout_s
        self._loop = asyncio.get_running_loop()
        self._ahead = b""
        self._waits_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_silent = self._is_spent = self.is_used = False

    @staticmethod
    async def open(address: Address, timeout_s: float) -> Connection:
        """A new connection. Raises HttpError."""
        context = ssl.create_default_context() if address.is_tls else None
        try:
            async with asyncio.timeout(timeout_s):
                streams = await asyncio.open_connection(address.host, address.port, ssl=context)
        except TimeoutError:
            raise HttpError(f"no connection within {timeout_s:g} s") from None
        except OSError as error:
            raise HttpError(f"no connection ({_said(error)})") from None
        return Connection(*streams, timeout_s)

    @property
    def is_open(self) -> bool:
        """Whether another request may be sent."""
        return not (self._is_spent or self._reader.at_eof() or self._writer.is_closing())

    def close(self) -> None:
        """Close at once; what is still to come is not wanted."""
        self._is_spent = True
        if self._timer is not None:
            self._timer.cancel()
        if not self._loop.is_closed():
            self._writer.transport.abort()

    def send(self, data: bytes) -> None:
        """Send a request, head and body, which the system or asyncio buffers."""
        self._writer.write(data)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer; names in small letters. Raises HttpError."""
        self._is_spent = True  # until the end of the body has come
        while b"\r\n\r\n" not in self._ahead:
            if len(self._ahead) > MOST_HEAD_NBYTES:
                raise HttpError(NOT_HTTP)
            if not (data := await self._read()):
                raise HttpError("the server closed the connection without an answer")
            self._ahead += data
        data, _, self._ahead = self._ahead.partition(b"\r\n\r\n")
        first, *lines = data.decode("latin-1").split("\r\n")
        version, _, status = first.partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdecimal():
            raise HttpError(NOT_HTTP)
        named = (line.partition(":") for line in lines)
        return int(status[:3]), {name.strip().lower(): value.strip() for name, _, value in named}

    async def body(self, headers: dict[str, str]) -> AsyncGenerator[bytes, None]:
        """The parts of the answer's body as they come. Raises HttpError where it ends too early."""
        framing: _Framing | None = None
        if "chunked" in headers.get("transfer-encoding", "").lower():
            framing = _Chunked()
        elif "content-length" in headers:
            if not headers["content-length"].isdecimal():
                raise HttpError(NOT_HTTP)
            framing = _Counted(int(headers["content-length"]))
        data, self._ahead = self._ahead, b""
        while framing is None or not framing.is_over:
            data = data or await self._read()
            if not data and framing is None:
                return  # the end of the connection is that of the body
            if not data:
                raise HttpError("the server closed the connection before the end of its answer")
            part, data = framing.feed(data) if framing else data, b""
            if part:
                yield part
        self._ahead = data or framing.rest
        self._is_spent = headers.get("connection", "").lower() == "close"
        self.is_used = True

    async def _read(self) -> bytes:
        """What comes next; nothing at the end of the connection."""
        self._waits_since = self._loop.time()
        if self._timer is None:  # one for many reads: they are too many for a timer each
            self._timer = self._loop.call_later(self._timeout_s, self._look)
        try:
            data = await self._reader.read(READ_NBYTES)
        except OSError as error:
            raise HttpError(f"the connection broke ({_said(error)})") from None
        finally:
            self._waits_since = None
        if self._is_silent:
            raise HttpError(f"the server was silent for {self._timeout_s:g} s")
        return data

    def _look(self) -> None:
        """Break the connection if the server has been silent for too long."""
        self._timer = None
        if self._waits_since is None:
            return
        left = self._waits_since + self._timeout_s - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
            return
        self._is_silent = True
        self._writer.transport.abort()


def _said(error: OSError) -> str:
    """What the system says; asyncio has words of its own around it."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else " ".join(str(error).split())


class Events:
    """The data of server-sent events in a body."""

    def __init__(self) -> None:
        self._ahead = b""

    def feed(self, part: bytes) -> list[bytes]:
        """The data of the lines that ``part`` completes."""
        *lines, self._ahead = (self._ahead + part).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def request(address: Address, method: str, path: str, body: bytes, api_key: str | None) -> bytes:
    """Head and body of a request."""
    host = f"[{address.host}]" if ":" in address.host else address.host
    lines = [
        f"{method} {address.path}{path} HTTP/1.1",
        f"Host: {host}:{address.port}",
        "User-Agent: pipeinfer-bench",
        "Accept: */*",
        *([] if api_key is None else [f"Authorization: Bearer {api_key}"]),
        *(["Content-Type: application/json", f"Content-Length: {len(body)}"] if body else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
