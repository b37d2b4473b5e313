"""A small HTTP/1.1 client on asyncio's streams, for many streaming requests at a time at little cost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from urllib.parse import urlsplit

from pipeinfer.core.errors import PipeinferError, refuse

READ_NBYTES = 1 << 16
MOST_HEAD_NBYTES = 1 << 16
"""The longest head of a response, and the longest line of its body."""


class HttpError(PipeinferError):
    """A server cannot be reached, closes too early, is silent for too long, or does not speak HTTP."""


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
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            refuse(f"--url {url} is no address of a server", "use http://HOST:PORT")
        is_tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return Address(parts.hostname, port or (443 if is_tls else 80), is_tls, path)


class Connection:
    """A connection, for one request after another. ``is_used``: whether it has had an answer already."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout_s: float) -> None:
        self._reader, self._writer, self._timeout_s = reader, writer, timeout_s
        self._ahead = b""
        self.is_used = self._is_spent = False

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
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self._writer.transport.abort()

    def send(self, data: bytes) -> None:
        """Send a request, head and body, which the system or asyncio buffers."""
        self._writer.write(data)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer; names in small letters. Raises HttpError."""
        while b"\r\n\r\n" not in self._ahead:
            if len(self._ahead) > MOST_HEAD_NBYTES:
                raise HttpError("the server's answer is not HTTP")
            self._ahead += await self._read()
        data, _, self._ahead = self._ahead.partition(b"\r\n\r\n")
        first, *lines = data.decode("latin-1").split("\r\n")
        try:
            version, status = first.split(" ", 2)[:2]
            if not version.startswith("HTTP/1."):
                raise ValueError
            code = int(status)
        except ValueError:
            raise HttpError("the server's answer is not HTTP") from None
        named = (line.partition(":") for line in lines)
        return code, {name.strip().lower(): value.strip() for name, _, value in named}

    async def body(self, headers: dict[str, str]) -> AsyncGenerator[bytes, None]:
        """The parts of the answer's body as they come. Raises HttpError where it ends too early."""
        self._is_spent = True  # until its end has come
        if "chunked" in headers.get("transfer-encoding", "").lower():
            while size := await self._chunk_size():
                async for part in self._exactly(size):
                    yield part
                await self._line()
            while await self._line():
                pass  # trailers
        elif "content-length" in headers:
            if not headers["content-length"].isdecimal():
                raise HttpError("the server's answer is not HTTP")
            async for part in self._exactly(int(headers["content-length"])):
                yield part
        else:  # until the connection closes
            with contextlib.suppress(EOFError):
                while True:
                    part, self._ahead = self._ahead or await self._read_some(), b""
                    yield part
            return
        self._is_spent = headers.get("connection", "").lower() == "close"
        self.is_used = True

    async def _chunk_size(self) -> int:
        try:
            return int((await self._line()).split(b";")[0], 16)
        except ValueError:
            raise HttpError("the server's answer is not HTTP") from None

    async def _line(self) -> bytes:
        while b"\n" not in self._ahead:
            if len(self._ahead) > MOST_HEAD_NBYTES:
                raise HttpError("the server's answer is not HTTP")
            self._ahead += await self._read()
        line, _, self._ahead = self._ahead.partition(b"\n")
        return line.rstrip(b"\r")

    async def _exactly(self, size: int) -> AsyncGenerator[bytes, None]:
        while size:
            part = self._ahead or await self._read()
            part, self._ahead = part[:size], part[size:]
            size -= len(part)
            yield part

    async def _read(self) -> bytes:
        try:
            return await self._read_some()
        except EOFError:
            raise HttpError("the server closed the connection before the end of its answer") from None

    async def _read_some(self) -> bytes:
        """What comes next. Raises EOFError at the end."""
        try:
            async with asyncio.timeout(self._timeout_s):
                data = await self._reader.read(READ_NBYTES)
        except TimeoutError:
            raise HttpError(f"the server was silent for {self._timeout_s:g} s") from None
        except OSError as error:
            raise HttpError(f"the connection broke ({_said(error)})") from None
        if not data:
            raise EOFError
        return data


def _said(error: OSError) -> str:
    """What the system says; asyncio has words of its own around it."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else " ".join(str(error).split())


async def read_events(parts: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The data of server-sent events in a body; of an event with several data lines, each."""
    ahead = b""
    async with contextlib.aclosing(parts):
        async for part in parts:
            *lines, ahead = (ahead + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()


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
