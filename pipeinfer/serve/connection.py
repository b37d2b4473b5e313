"""One client's connection: uvicorn's, which ends where the client sends no request or takes no answer."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeinfer.serve.bodies import encoded
from pipeinfer.serve.errors import ApiError

HEAD_S = 30.0
"""How long a client may take to send the head of a request, once it has connected or has begun to send one."""
TAKE_S = 60.0
"""How long a client may take nothing while more than the socket holds waits to be sent."""

DRAIN_S, DRAIN_NBYTES = 5.0, 16 << 20
"""What is read of a body after the response, so that its client comes to read that: for how long, and how much."""


class Connection(H11Protocol):
    """A connection with time limits for both directions. There are at most ``most`` at a time."""

    most = 1 << 30

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._head_timer: asyncio.TimerHandle | None = None
        self._take_timer: asyncio.TimerHandle | None = None
        self._drain_timer: asyncio.TimerHandle | None = None
        self._drained_nbytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all timers."""
        self._head_came()
        self._stop_draining()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what the client sends."""
        if self._drain_timer is not None:
            self._drained_nbytes += len(data)
            if self._drained_nbytes > DRAIN_NBYTES:
                self.flow.pause_reading()
                return
        super().data_received(data)
        if self.conn.their_state is not h11.SEND_BODY:
            self._stop_draining()
        if self.conn.their_state is not h11.IDLE:
            self._head_came()
        elif self._head_timer is None and not self.transport.is_closing():
            self._await_head()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def on_response_complete(self) -> None:
        """Wait for the next request. A body that nobody has read is read for a while, and thrown away."""
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._drain_timer = self.loop.call_later(DRAIN_S, self.transport.abort)

    def _stop_draining(self) -> None:
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None

    def pause_writing(self) -> None:
        """The client is slow: much waits to be sent to it."""
        super().pause_writing()
        self._take_timer = self.loop.call_later(TAKE_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has taken most of what waited."""
        if self._take_timer is not None:
            self._take_timer.cancel()
            self._take_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, as all errors are told."""
        body = encoded(ApiError(400, msg).body())
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            events = (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body))
            for event in (*events, h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
