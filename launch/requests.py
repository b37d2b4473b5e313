"""The requests that programs wait for, by number, whoever drives the job and whichever thread asks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pipeinfer.core.errors import PipeinferError
from pipeinfer.core.ports import RequestStats


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What the head hears of request ``number`` at ``at_s`` (monotonic seconds): that it was submitted, tokens with
    their log-probabilities, how it ended. The last news has a ``stats`` or, where the job broke, an ``error``.

    ``reason``: stop, length, aborted or error; with error, ``fault`` is the layer whose numbers were not finite.
    ``load``: the orchestrator's, for those who watch."""

    at_s: float
    tokens: tuple[int, ...] = ()
    reason: str = ""
    stats: RequestStats | None = None
    logps: tuple[float, ...] = ()
    load: tuple[int, int] = (0, 0)
    number: int = 0
    fault: int | None = None
    error: BaseException | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing more comes."""
        return self.stats is not None or self.error is not None


Hear = Callable[[RequestOutput], None]
"""Takes the news of one request, in order, on the thread that drives the job; it must not wait for anything."""


class JobOver(PipeinferError):
    """The job has ended, and takes no more requests."""


class Requests:
    """Who is to hear of which request. All of it may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hear: dict[int, Hear] = {}
        self._last = 0
        self._error: BaseException | None = None
        self.is_closing = False

    def open(self, hear: Hear) -> int:
        """The number of a new request, whose news ``hear`` takes. Raises JobOver after ``close`` and ``fail``."""
        with self._lock:
            if self.is_closing:
                raise JobOver("the engine is closed")
            if self._error is not None:
                raise JobOver(f"the job has ended ({self._error})") from self._error
            self._last += 1
            self._hear[self._last] = hear
            return self._last

    def tell(self, news: RequestOutput) -> None:
        """Pass ``news`` on to whom it concerns."""
        with self._lock:
            hear = self._hear.pop(news.number, None) if news.is_last else self._hear.get(news.number)
        if hear is not None:
            hear(news)

    def fail(self, error: BaseException, now: float) -> None:
        """The job has ended by ``error``: so do all its requests, and later ones are refused."""
        with self._lock:
            self._error = self._error or error
            open_ones = list(self._hear)
        for number in open_ones:
            self.tell(RequestOutput(now, reason="error", number=number, error=error))

    def close(self) -> BaseException | None:
        """No more requests are taken; what has broken the job, if something has."""
        with self._lock:
            self.is_closing = True
            return self._error
