"""The head of a job: carries out what programs order, from any thread, on the one thread that drives the job.

Requests are handed to the orchestrator at once; it queues them. The driving thread is one of its own (threaded), or,
where MPI allows no second one, whichever waits for an answer. A slow consumer stalls nobody: news are handed on and
never waited for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from launch.job import Job
from launch.requests import Hear, RequestOutput, Requests
from pipeinfer.core.errors import StallError, UserError
from pipeinfer.core.ports import Aborted, Emit, Finish, Request, Submitted

GRACE_S = 3.0
"""So long a program may take to leave once its job has broken; then the other ranks are ended without it."""


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


class Head:
    """Leads ``job``, whose head this is, and tells ``tell`` what becomes of requests, on the thread that drives."""

    def __init__(self, job: Job, tell: Callable[[RequestOutput], None]) -> None:
        self._job = job
        self._tell = tell
        self._orders: SimpleQueue[Order] = SimpleQueue()
        self._served: dict[int, tuple[str, int | None]] = {}  # by number: how it ended, if it has and is not idle yet
        self._is_closing = False

    def order(self, order: Order) -> None:
        """From any thread: have ``order`` carried out soon."""
        self._orders.put(order)
        self._job.wake()

    def lead(self) -> None:
        """Serve until somebody orders to close; then let everybody go."""
        while not self._is_closing:
            self.step()
        for number in self._served:
            self._job.deliver(Aborted(number))
        while self._served:
            self.step()
        self._job.close()

    def step(self) -> None:
        """Carry out orders, drive the job one turn, pass on what it tells. Raises StallError, after asking every role
        what it is doing, if requests wait and nothing moves for the configured time."""
        while not self._orders.empty():
            self._carry_out(self._orders.get())
        news = self._job.turn()
        while news:
            self._pass_on(*news.popleft())
        if self._served and self._job.is_stalled and (words := self._job.explain()):
            raise StallError(words)

    def _carry_out(self, order: Order) -> None:
        if isinstance(order, Submit):
            self._served[order.number] = "", None
            self._tell(RequestOutput(time.monotonic(), number=order.number))
            self._job.deliver(Submitted(order.request, order.number))
        elif isinstance(order, Cancel):
            self._job.deliver(Aborted(order.number))
        else:
            self._is_closing = True

    def _pass_on(self, at_s: float, told: Any) -> None:
        number = told.number
        if isinstance(told, Emit):
            self._tell(RequestOutput(at_s, told.tokens, logps=told.logps, load=self._job.load, number=number))
        elif isinstance(told, Finish):
            self._served[number] = told.reason, told.fault
        else:
            reason, fault = self._served.pop(number)
            self._tell(RequestOutput(at_s, reason=reason, stats=told.stats, number=number, fault=fault))


class LocalJob:
    """A job whose head is this process. ``fail`` ends the other ranks, if there are any; ``is_threaded``: whether a
    thread of its own drives it, or whoever waits."""

    def __init__(self, job: Job, is_threaded: bool, fail: Callable[[BaseException], object] | None = None) -> None:
        self._job, self._fail = job, fail
        self.is_threaded = is_threaded
        self.ranks = job.ranks
        self._requests = Requests()
        self._head = Head(job, self._requests.tell)
        self._error: BaseException | None = None
        self._left = threading.Event()
        self._owner = threading.current_thread()
        self._thread: threading.Thread | None = None
        if is_threaded:
            self._thread = threading.Thread(target=self._lead, name="pipeinfer driver", daemon=True)
            self._thread.start()

    @property
    def traffic(self) -> tuple[int, int]:
        """See Job."""
        return self._job.traffic

    def _lead(self) -> None:
        try:
            self._head.lead()
        except BaseException as error:
            self._broke(error)
            if self._fail is not None and not self._left.wait(GRACE_S):
                self._fail(error)

    def _broke(self, error: BaseException) -> None:
        self._error = error
        self._requests.fail(error, time.monotonic())

    def submit(self, request: Request, hear: Hear) -> int:
        """From any thread: serve ``request``, whose news ``hear`` takes; its number. Raises JobOver."""
        number = self._requests.open(hear)
        self._head.order(Submit(number, request))
        return number

    def cancel(self, number: int) -> None:
        """From any thread: no more of request ``number`` is wanted; its last news still comes."""
        self._head.order(Cancel(number))

    def wait(self, news: threading.Condition, ready: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait, holding ``news``, which is notified of what may change ``ready``; whether it is."""
        if self._thread is not None:
            return news.wait_for(ready, timeout_s)
        if threading.current_thread() is not self._owner:
            raise UserError("this MPI grants one thread only; wait for answers on the one that opened the engine")
        until = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while not ready() and (until is None or time.monotonic() < until):
                self._head.step()
        except BaseException as error:
            self._broke(error)
            raise
        return ready()

    def decode(self, request: Request) -> list[RequestOutput]:
        """All news of ``request``, waited for. Raises what has broken the job."""
        told, changed = list[RequestOutput](), threading.Condition()

        def hear(news: RequestOutput) -> None:
            with changed:
                told.append(news)
                changed.notify_all()

        self.submit(request, hear)
        with changed:
            self.wait(changed, lambda: bool(told) and told[-1].is_last)
        if (error := told[-1].error) is not None:
            raise error
        return told

    def close(self) -> None:
        """Let everybody go; raises what has broken the job, if something has."""
        self._requests.close()
        self._left.set()
        self._head.order(Close())
        if self._thread is None:
            self._head.lead()
            return
        self._thread.join()
        if self._error is not None:
            raise self._error

    def kill(self) -> None:
        """Let go of what this process holds, now. The other ranks are the caller's to end."""
        self._left.set()
        self._requests.close()
        self._head.order(Close())
        if self._thread is not None:
            self._thread.join(GRACE_S)
        self._job.kill()
