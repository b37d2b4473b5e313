"""Errors of the HTTP interface, in the form of OpenAI's error object."""

from __future__ import annotations

from typing import Any

BUSY_S = 1
"""What Retry-After says, in seconds."""


class ApiError(Exception):
    """An answer with HTTP ``status`` that says what is wrong. ``param``: the field of the request that is at fault;
    ``code``: OpenAI's short name of the error, where it has one."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def headers(self) -> dict[str, str]:
        """The headers that belong to the status."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": str(BUSY_S)} if self.status in (429, 503) else {}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """The error (400) of a request whose field ``param`` cannot be served as it is."""
    return ApiError(400, message, param, code)
