"""Who may ask."""

from __future__ import annotations

import hmac

from starlette.requests import Request

from pipeinfer.serve.errors import ApiError


def check_key(request: Request, api_key: str | None) -> None:
    """Raise ApiError (401) unless the request has the key, if one is needed."""
    if api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), api_key.encode()):
        return
    message = "the API key is wrong" if given else "an API key is required: Authorization: Bearer KEY"
    raise ApiError(401, message, code="invalid_api_key")
