"""Requests between HTTP and the engine: bounds, submitting, and the end of all of them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from launch.requests import JobOver
from pipeinfer.core.errors import UserError
from pipeinfer.engine.answer import Handle
from pipeinfer.engine.engine import Engine
from pipeinfer.engine.request_builder import ContextExceeded
from pipeinfer.serve.errors import ApiError, invalid
from pipeinfer.serve.fields import COMPLETION_TOKENS, ApiRequest


class Front:
    """What the endpoints share. ``model``: the name of the model; ``max_queue``: the most requests that are decoded or
    wait to be, further ones are refused. ``on_idle``: called when the last request ends after ``close``.

    It is used on the thread of the HTTP server, but for ``open``, ``close``, ``is_busy`` and ``cancel_all``."""

    def __init__(self, model: str, max_queue: int, on_idle: Callable[[], object]) -> None:
        self.model = model
        self._max_queue, self._on_idle = max_queue, on_idle
        self._engine: Engine | None = None
        self._is_closing = self._is_cancelling = False
        self._places = 0
        self._handles = set[Handle]()
        # One thread: tokenizers are not made for several, and a long prompt must not hold up the other answers.
        self._submitting = ThreadPoolExecutor(1, "pipeinfer submit")

    def open(self, engine: Engine) -> None:
        """From any thread: serve by ``engine`` from now on."""
        self._engine = engine

    def close(self) -> None:
        """From any thread: refuse requests from now on; those that were taken go on."""
        self._is_closing = True

    @property
    def is_busy(self) -> bool:
        """Whether requests have not ended."""
        return self._places > 0

    def cancel_all(self) -> None:
        """From any thread: close, and cancel what has not ended."""
        self._is_closing = self._is_cancelling = True
        for handle in list(self._handles):
            handle.cancel()

    def engine(self) -> Engine:
        """The engine. Raises ApiError (503) while it loads, when it has failed, and when the server ends."""
        if self._is_closing:
            raise ApiError(503, "the server is shutting down")
        if self._engine is None:
            raise ApiError(503, "the model is being loaded")
        if self._engine.failure is not None:
            raise ApiError(503, f"the engine has failed: {self._engine.failure}")
        return self._engine

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue while the ``with`` lasts. Raises ApiError (429) if there is none."""
        if self._places >= self._max_queue:
            raise ApiError(429, f"{self._places} requests wait already; try again later", code="rate_limit_exceeded")
        self._places += 1
        try:
            yield
        finally:
            self._places -= 1
            if self._is_closing and not self._places:
                self._on_idle()

    @contextlib.asynccontextmanager
    async def decoding(self, engine: Engine, asked: ApiRequest) -> AsyncIterator[Handle]:
        """The answer to ``asked``; what is left of it is cancelled at the end of the ``with``. Raises ApiError where it
        cannot be served."""
        submitted = self._submitting.submit(submit, engine, asked)
        try:
            handle = await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_give_up)
            raise
        self._handles.add(handle)
        try:
            if self._is_cancelling:
                handle.cancel()
            yield handle
        finally:
            self._handles.discard(handle)
            handle.cancel()  # where it has ended nothing happens


def _give_up(submitted: Future[Handle]) -> None:
    """Cancel what was submitted for a client that has gone meanwhile."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


def submit(engine: Engine, asked: ApiRequest) -> Handle:
    """Have ``engine`` decode ``asked``. Raises ApiError where it cannot."""
    param = "prompt" if asked.messages is None else "messages"
    try:
        prompt = asked.prompt if asked.messages is None else engine.tokenize_chat(asked.messages)
        tokens = engine.tokenize(prompt, 1)
        room = engine.context - len(tokens)
        default = min(room, COMPLETION_TOKENS) if asked.messages is None else room
        limit = default if asked.max_new_tokens is None else asked.max_new_tokens
        engine.tokenize(tokens, limit)
        sampling = replace(engine.sampling, **asked.sampling)
        if "seed" not in asked.sampling and sampling.temperature:
            sampling = replace(sampling, seed=secrets.randbits(64))
        param = "stop"  # all else has been looked at
        return engine.submit(tokens, limit, asked.ignore_eos, sampling=sampling, stop=asked.stop)
    except ContextExceeded as error:
        raise invalid(param, str(error), "context_length_exceeded") from None
    except UserError as error:
        raise invalid(param, str(error)) from None
    except JobOver as error:
        raise ApiError(503, str(error)) from None
