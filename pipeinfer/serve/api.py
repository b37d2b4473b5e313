"""The HTTP endpoints, as a Starlette application."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from launch.failure import write
from pipeinfer.serve import metrics, openapi, status
from pipeinfer.serve.access import check_key
from pipeinfer.serve.bodies import as_json
from pipeinfer.serve.decoding import Decoding
from pipeinfer.serve.errors import ApiError
from pipeinfer.serve.fields import DEFAULT_MODEL
from pipeinfer.serve.front import Front
from pipeinfer.serve.tokenizing import Tokenizing


def application(front: Front, api_key: str | None, is_crowded: Callable[[], bool]) -> ASGIApp:
    """The endpoints of ``front``. ``api_key``: what clients must send, if anything; /health and /metrics are open.
    ``is_crowded``: whether there are too many connections."""

    async def health(request: Request) -> Response:
        front.engine()
        return as_json({"status": "ok"})

    async def counters(request: Request) -> Response:
        front.engine()
        text = front.metrics.text(front.served, front.running, front.waiting, front.kv_usage)
        return Response(text.encode(errors="replace"), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def models(request: Request) -> Response:
        check_key(request, api_key)
        return as_json({"object": "list", "data": [_model(front, created)]})

    async def one_model(request: Request) -> Response:
        check_key(request, api_key)
        if request.path_params["name"] not in (front.model, DEFAULT_MODEL):
            raise ApiError(404, "the model does not exist", "model", "model_not_found")
        return as_json(_model(front, created))

    async def description(request: Request) -> Response:
        return as_json(openapi.document(front.model))

    created = int(time.time())
    tokenizing = Tokenizing(front, api_key)
    routes = [
        *status.routes(front, api_key),
        Route("/health", health),
        Route("/metrics", counters),
        Route("/openapi.json", description),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/v1/completions", Decoding(front, api_key, is_chat=False), methods=["POST"]),
        Route("/v1/chat/completions", Decoding(front, api_key, is_chat=True), methods=["POST"]),
        Route("/tokenize", tokenizing.tokenize, methods=["POST"]),
        Route("/detokenize", tokenizing.detokenize, methods=["POST"]),
    ]
    handlers: Any = {ApiError: _told, HTTPException: _refused, ClientDisconnect: _gone, Exception: _unforeseen}
    served = Starlette(routes=routes, exception_handlers=handlers)

    async def unless_crowded(scope: Scope, receive: Receive, send: Send) -> None:
        if is_crowded():
            error = ApiError(503, "too many connections; try again later")
            refusal = as_json(error.body(), error.status, error.headers | {"Connection": "close"})
            await refusal(scope, receive, send)
        else:
            await served(scope, receive, send)

    return unless_crowded


def _model(front: Front, created: int) -> dict[str, Any]:
    return {"id": front.model, "object": "model", "created": created, "owned_by": "pipeinfer"}


async def _told(request: Request, error: ApiError) -> Response:
    return as_json(error.body(), error.status, error.headers)


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    """Nobody hears an answer."""
    return Response(status_code=499)


async def _refused(request: Request, error: HTTPException) -> Response:
    """What Starlette itself refuses: unknown addresses and methods."""
    told = ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
    return as_json(told.body(), error.status_code, dict(error.headers or {}))


async def _unforeseen(request: Request, error: Exception) -> Response:
    """A defect of ours: its traceback goes to standard error, and the server goes on."""
    write("pipeinfer: an unforeseen error; please report this:\n" + "".join(traceback.format_exception(error)).rstrip())
    told = ApiError(500, "an unforeseen error; the server's standard error has it")
    return as_json(told.body(), 500, {"Connection": "close"})  # as uvicorn does after an exception
