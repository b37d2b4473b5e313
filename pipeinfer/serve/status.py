"""The page at ``/`` and what it shows."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from pipeinfer.serve.access import check_key
from pipeinfer.serve.bodies import as_json
from pipeinfer.serve.front import Front
from pipeinfer.serve.served import Served

FILES = {"/": ("index.html", "text/html"), "/page.js": ("page.js", "text/javascript")}
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


def routes(front: Front, api_key: str | None) -> list[Route]:
    """The page, which is open to all, and the status, which shows texts and so needs the key."""
    began_at = time.monotonic()

    async def status(request: Request) -> Response:
        check_key(request, api_key)
        return as_json(snapshot(front, time.monotonic(), began_at), headers={"Cache-Control": "no-store"})

    return [Route("/status", status), *(Route(path, _file(*file)) for path, file in FILES.items())]


def _file(name: str, kind: str) -> Callable[[Request], Any]:
    content = Path(__file__).with_name("page").joinpath(name).read_bytes()

    async def send(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return send


def snapshot(front: Front, now: float, began_at: float) -> dict[str, Any]:
    """What the server does at ``now``; ``began_at``: when it began (monotonic seconds)."""
    totals = front.metrics.totals(front.served)
    served = sorted(front.served, key=lambda one: one.number)
    return {
        "model": front.model,
        "state": front.state,
        "uptime_s": now - began_at,
        "ranks": front.ranks(),
        "running": front.running,
        "waiting": front.waiting,
        "runs_in_flight": front.runs_in_flight,
        "kv_usage": front.kv_usage,
        "prompt_tokens": totals.prompt_tokens,
        "tokens": totals.tokens,
        "acceptance": totals.accepted / totals.drafted if totals.drafted else None,
        "requests": [_request(one, now) for one in served],
    }


def _request(served: Served, now: float) -> dict[str, Any]:
    completion = served.completion
    return {
        "number": served.number,
        "state": completion.finish_reason or ("decoding" if completion.tokens else "waiting"),
        "priority": served.priority,
        "prompt_tokens": len(completion.prompt_tokens),
        "tokens": len(completion.tokens),
        "seconds": now - served.began_at,
        "text": served.tail,
    }
