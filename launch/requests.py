"""The requests that programs wait for, by number, for any driving thread and any asking thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pipeinfer.core.errors import PipeinferError
from pipeinfer.core.messages import TopToken
from pipeinfer.core.ports import Request, RequestStats


@dataclass(frozen=True, slots=True)
class Submit:
    """Serve this request."""

    number: int
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    """No more of this request is wanted."""

    number: int


@dataclass(frozen=True, slots=True)
class Close:
    """No further request will come: let everybody go."""


Order = Submit | Cancel | Close


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The output of request ``number`` at ``at_s`` (monotonic seconds): that it was submitted, tokens with their
    log-probabilities and, if wanted, the most probable tokens in the place of each, how it ended. With
    ``is_of_prompt`` log-probabilities are those of its prompt's next tokens (see ports.Score). The last output has a
    ``stats`` or, if the job failed, an ``error``.

    ``reason``: stop, length, aborted or error; with error, ``fault`` is the layer whose numbers were not finite.
    ``load``: the orchestrator's, for those who watch."""

    at_s: float
    tokens: tuple[int, ...] = ()
    reason: str = ""
    stats: RequestStats | None = None
    logps: tuple[float, ...] = ()
    tops: tuple[tuple[TopToken, ...], ...] = ()
    load: tuple[int, int, float] = (0, 0, 0.0)
    number: int = 0
    fault: int | None = None
    error: BaseException | None = None
    is_of_prompt: bool = False

    @property
    def is_last(self) -> bool:
        """Whether nothing more comes."""
        return self.stats is not None or self.error is not None


OnOutput = Callable[[RequestOutput], None]
"""Takes the output of one request, in order, on the thread that drives the job; it must not wait for anything."""


class JobOver(PipeinferError):
    """The job has ended, and takes no more requests."""


class Requests:
    """The callback of each request. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._on_output: dict[int, OnOutput] = {}
        self._last = 0
        self._error: BaseException | None = None
        self.is_closing = False

    @property
    def failure(self) -> BaseException | None:
        """What has ended the job early, if something has."""
        return self._error

    def open(self, on_output: OnOutput) -> int:
        """The number of a new request; ``on_output`` takes its output. Raises JobOver after ``close`` and ``fail``."""
        with self._lock:
            if self.is_closing:
                raise JobOver("the engine is closed")
            if self._error is not None:
                raise JobOver(f"the job has ended ({self._error})") from self._error
            self._last += 1
            self._on_output[self._last] = on_output
            return self._last

    def deliver(self, output: RequestOutput) -> None:
        """Pass ``output`` to the callback of its request."""
        with self._lock:
            callbacks = self._on_output
            on_output = callbacks.pop(output.number, None) if output.is_last else callbacks.get(output.number)
        if on_output is not None:
            on_output(output)

    def fail(self, error: BaseException, now: float) -> None:
        """The job has ended by ``error``: so do all its requests, and later ones are refused."""
        with self._lock:
            self._error = self._error or error
            open_ones = list(self._on_output)
        for number in open_ones:
            self.deliver(RequestOutput(now, reason="error", number=number, error=error))

    def close(self) -> BaseException | None:
        """No more requests are taken; what has broken the job, if something has."""
        with self._lock:
            self.is_closing = True
            return self._error
