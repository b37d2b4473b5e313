"""The HTTP server: uvicorn on a thread of its own, its socket, and its end by a signal."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from queue import Empty, SimpleQueue
from types import FrameType

import uvicorn

from pipeinfer.core.errors import PipeinferError, refuse
from pipeinfer.engine.engine import Engine
from pipeinfer.serve.api import application
from pipeinfer.serve.connection import Connection
from pipeinfer.serve.front import Front

FLUSH_S = 5.0
"""How long cancelled requests have to answer their clients."""
LOOK_S = 0.5
"""How often an idle server looks whether the engine has failed."""
ASKED, IDLE, ENDED = "a signal asks for the end", "no request is left", "the thread has ended"
SPARE_CONNECTIONS = 256
"""Connections beside those that wait for an answer. Further ones are refused with 503; of twice as many, closed."""
MAX_HEAD_NBYTES = 64 << 10
"""Of a request's line and headers."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where there can be none."""
    if not 0 <= port < 2**16:
        refuse(f"--port {port}", "use a number from 0 (any free port) to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(found[4][:2], family=found[0], backlog=128)
        # Connections inherit it. Else a stream's first piece waits for the client's delayed ACK of the head, 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        refuse(f"{host}, port {port}: cannot listen there ({reason})", "name another --host or --port")


class Server:
    """Serves HTTP at ``host`` and ``port``, from ``start`` to the end of the ``with``. Until ``serve`` is called with
    an engine, clients learn that the model is being loaded. ``model``: its name. ``api_key``: what clients must send,
    or None. ``max_queue``: see Front. ``grace_s``: seconds that requests have to end once the server is asked to."""

    def __init__(self, host: str, port: int, model: str, api_key: str | None, max_queue: int, grace_s: float) -> None:
        self._host, self._port, self._grace_s = host, port, grace_s
        self._events: SimpleQueue[str] = SimpleQueue()  # signal handlers may put something into this kind of queue
        self._front = Front(model, max_queue, on_idle=lambda: self._events.put(IDLE))
        self._thread = threading.Thread(target=self._run, name="pipeinfer http", daemon=True)
        self._socket: socket.socket | None = None
        self._error: BaseException | None = None  # what has ended the thread
        self._held = ExitStack()
        most = max_queue + SPARE_CONNECTIONS
        config = uvicorn.Config(
            application(self._front, api_key, lambda: len(self._uvicorn.server_state.connections) > most),
            loop="asyncio",
            http=type("Bounded", (Connection,), {"most": 2 * most}),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=MAX_HEAD_NBYTES,
        )
        self._uvicorn = uvicorn.Server(config)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._front.cancel_all()
        self._uvicorn.should_exit = True
        if self._thread.is_alive():
            self._thread.join(FLUSH_S)
        self._held.close()

    def start(self) -> None:
        """Listen. Raises UserError where that cannot be."""
        self._socket = listen(self._host, self._port)
        self._port = self._socket.getsockname()[1]
        self._thread.start()

    @property
    def url(self) -> str:
        """The address for clients; with port 0, once the server has started."""
        return f"http://{f'[{self._host}]' if ':' in self._host else self._host}:{self._port}"

    def _run(self) -> None:
        assert self._socket is not None
        try:
            self._uvicorn.run([self._socket])
            if not self._uvicorn.should_exit:
                raise PipeinferError("the HTTP server has ended by itself")
        except BaseException as error:
            self._error = error
        finally:
            self._events.put(ENDED)

    def serve(self, engine: Engine, announce: Callable[[], object]) -> None:
        """Serve by ``engine`` until SIGTERM or SIGINT; then let the requests end. Those that have not ended after the
        grace time, or at a second signal, are cancelled. ``announce`` is called as soon as requests are taken. On the
        main thread. Raises what has ended the engine's job."""
        self._take_signals()
        self._front.open(engine)
        announce()
        self._front.warm_up(engine)
        while engine.failure is None and self._error is None:
            with suppress(Empty):
                self._events.get(timeout=LOOK_S)
                break
        self._end(self._grace_s if engine.failure is None else FLUSH_S)
        error = engine.failure or self._error
        if error is not None:
            raise error

    def _end(self, grace_s: float) -> None:
        """Take no more requests, let those that were taken end, and end the thread."""
        self._front.close()
        self._await_idle(grace_s)
        self._front.cancel_all()
        self._await_idle(FLUSH_S)
        # Not earlier: to applications uvicorn then says that all clients have left.
        self._uvicorn.should_exit = True
        self._thread.join(FLUSH_S)
        self._uvicorn.force_exit = True  # clients that do not take their answers
        self._thread.join(FLUSH_S)

    def _await_idle(self, most_s: float) -> None:
        """Wait until all requests have ended, for ``most_s`` seconds or until the next signal."""
        until = time.monotonic() + most_s
        while self._front.is_busy and self._thread.is_alive():
            try:
                if self._events.get(timeout=max(0.0, until - time.monotonic())) == ASKED:
                    return
            except Empty:
                return

    def _take_signals(self) -> None:
        """SIGTERM and SIGINT are events, from now to the end of the ``with``: launchers may send them again."""

        def asked(signum: int, frame: FrameType | None) -> None:
            self._events.put(ASKED)

        for signum in (signal.SIGTERM, signal.SIGINT):
            self._held.callback(signal.signal, signum, signal.signal(signum, asked))
