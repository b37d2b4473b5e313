"""Bodies of requests and responses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pipeinfer.serve.errors import ApiError

MAX_BODY_NBYTES = 4 << 20
"""A longer body is refused. A prompt of 128k tokens has less than 1 MiB."""
BODY_S = 60.0
"""How long a client may take to send a body."""
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes each event on at once
]


async def read_body(request: Request) -> bytes:
    """The body. Raises ApiError: 413 as soon as it is too long, 408 if it takes too long; ClientDisconnect if the
    client goes away."""
    too_long = ApiError(413, f"the body is longer than {MAX_BODY_NBYTES} bytes")
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and (len(told) > 18 or int(told) > MAX_BODY_NBYTES):
        raise too_long
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                data += part
                if len(data) > MAX_BODY_NBYTES:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"the body has not come within {BODY_S:g} seconds") from None
    return bytes(data)


def encoded(body: Mapping[str, Any]) -> bytes:
    """``body`` as JSON."""
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


def event(data: bytes) -> bytes:
    """``data`` as a server-sent event."""
    return b"data: " + data + b"\n\n"


def as_json(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with ``body``."""
    return Response(encoded(body), status, headers, "application/json")
