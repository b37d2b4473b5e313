"""The HTTP endpoints, as a Starlette application."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import traceback
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from launch.failure import write
from pipeinfer.core.errors import PipeinferError
from pipeinfer.engine.answer import Handle
from pipeinfer.serve.errors import ApiError
from pipeinfer.serve.fields import DEFAULT_MODEL, ApiRequest, parse
from pipeinfer.serve.front import Front
from pipeinfer.serve.replies import ChatReply, Reply, TextReply, TokenTexts

MAX_BODY_NBYTES = 4 << 20
"""A longer body is refused. A prompt of 128k tokens has less than 1 MiB."""
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes each event on at once
]


def application(front: Front, api_key: str | None) -> Starlette:
    """The endpoints of ``front``. ``api_key``: what clients must send, if anything; /health is open to all."""

    def guarded(request: Request) -> None:
        _check_key(request, api_key)

    async def health(request: Request) -> Response:
        front.engine()
        return _json({"status": "ok"})

    async def models(request: Request) -> Response:
        guarded(request)
        return _json({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        guarded(request)
        if request.path_params["name"] not in (front.model, DEFAULT_MODEL):
            raise ApiError(404, "the model does not exist", "model", "model_not_found")
        return _json(model)

    model = {"id": front.model, "object": "model", "created": int(time.time()), "owned_by": "pipeinfer"}
    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/completions", Decoding(front, api_key, is_chat=False), methods=["POST"]),
        Route("/v1/chat/completions", Decoding(front, api_key, is_chat=True), methods=["POST"]),
    ]
    handlers: Any = {ApiError: _told, HTTPException: _refused, Exception: _unforeseen}
    return Starlette(routes=routes, exception_handlers=handlers)


class Decoding:
    """The ASGI application of an endpoint that decodes."""

    def __init__(self, front: Front, api_key: str | None, is_chat: bool) -> None:
        self._front, self._api_key, self._is_chat = front, api_key, is_chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ApiError before the response begins."""
        request = Request(scope, receive)
        _check_key(request, self._api_key)
        self._front.engine()
        try:
            data = await _read_body(request)
            asked = parse(data, self._is_chat, (self._front.model, DEFAULT_MODEL))
            with self._front.place():
                await _unless_gone(receive, self._answer(asked, scope, receive, send))
        except ClientDisconnect:
            pass  # nobody hears an answer

    async def _answer(self, asked: ApiRequest, scope: Scope, receive: Receive, send: Send) -> None:
        engine = self._front.engine()
        async with self._front.decoding(engine, asked) as handle:
            previous = handle.completion.prompt_tokens[-1]
            texts = TokenTexts(engine.decode, previous) if asked.with_logprobs else None
            kind = ChatReply if self._is_chat else TextReply
            reply: Reply = kind(self._front.model, texts, asked.stream and asked.include_usage)
            if asked.stream:
                await _send_stream(_events(handle, reply), send)
            else:
                await _json(await _whole(handle, reply))(scope, receive, send)


async def _whole(handle: Handle, reply: Reply) -> dict[str, Any]:
    try:
        await handle
    except PipeinferError as error:
        raise ApiError(500, str(error)) from None
    _refuse_cancelled(handle)
    return reply.whole(handle.completion)


async def _events(handle: Handle, reply: Reply) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a stream; an error is the last of them."""
    completion = handle.completion
    try:
        for chunk in reply.opening():
            yield chunk
        async for piece in handle:
            yield reply.chunk(completion, piece)
        _refuse_cancelled(handle)
        yield reply.chunk(completion, "", completion.finish_reason)
        if reply.with_usage:
            yield reply.usage_chunk(completion)
    except ApiError as error:
        yield error.body()
    except PipeinferError as error:
        yield ApiError(500, str(error)).body()


def _refuse_cancelled(handle: Handle) -> None:
    """Raise ApiError where the answer was cancelled though its client is there."""
    if handle.completion.finish_reason == "cancelled":
        raise ApiError(503, "the server is shutting down")


async def _send_stream(chunks: AsyncGenerator[dict[str, Any], None], send: Send) -> None:
    """Send ``chunks`` as server-sent events."""
    await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            await send({"type": "http.response.body", "body": _event(_encoded(chunk)), "more_body": True})
    await send({"type": "http.response.body", "body": _event(b"[DONE]")})


async def _unless_gone(receive: Receive, answering: Coroutine[Any, Any, None]) -> None:
    """Do ``answering``. If the client goes away before its end, cancel it and raise ClientDisconnect."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.ensure_future(answering), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        is_answered = answer.done()
    finally:
        answer.cancel()
        leaving.cancel()
        await asyncio.gather(answer, leaving, return_exceptions=True)
    if not is_answered:
        raise ClientDisconnect
    answer.result()


async def _read_body(request: Request) -> bytes:
    """The body. Raises ApiError (413) as soon as it is too long, ClientDisconnect if the client goes away."""
    too_long = ApiError(413, f"the body is longer than {MAX_BODY_NBYTES} bytes")
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told) > MAX_BODY_NBYTES:
        raise too_long
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_NBYTES:
            raise too_long
    return bytes(data)


def _check_key(request: Request, api_key: str | None) -> None:
    """Raise ApiError (401) unless the request has the key."""
    if api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), api_key.encode()):
        return
    message = "the API key is wrong" if given else "an API key is required: Authorization: Bearer KEY"
    raise ApiError(401, message, code="invalid_api_key")


def _encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def _json(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encoded(body), status, headers, "application/json")


async def _told(request: Request, error: ApiError) -> Response:
    return _json(error.body(), error.status, error.headers)


async def _refused(request: Request, error: HTTPException) -> Response:
    """What Starlette itself refuses: unknown addresses and methods."""
    told = ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
    return _json(told.body(), error.status_code, dict(error.headers or {}))


async def _unforeseen(request: Request, error: Exception) -> Response:
    """A defect of ours: its traceback goes to standard error, and the server goes on."""
    write("pipeinfer: an unforeseen error; please report this:\n" + "".join(traceback.format_exception(error)).rstrip())
    return _json(ApiError(500, "an unforeseen error; the server's standard error has it").body(), 500)
