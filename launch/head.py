"""The head of a job: carries out what programs order, from any thread, on the one thread that drives the job.

Requests are handed to the orchestrator at once; it queues them. The driving thread is one of its own (threaded), or,
where MPI allows no second one, whichever waits for an answer. A slow consumer does not stall the job: output is handed
on without waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from launch.job import Job
from launch.requests import Cancel, Close, OnOutput, Order, RequestOutput, Requests, Submit
from pipeinfer.core.errors import StallError, UserError
from pipeinfer.core.ports import Aborted, Emit, Finish, Request, Score, Submitted

GRACE_S = 3.0
"""A program's time to exit after its job has failed; then the other ranks are ended."""


class Head:
    """Leads ``job``, whose head this is, and gives the output of requests to ``pass_on``, on the thread that drives."""

    def __init__(self, job: Job, pass_on: Callable[[RequestOutput], None]) -> None:
        self._job = job
        self._pass_on = pass_on
        self._orders: SimpleQueue[Order] = SimpleQueue()
        self._served: dict[int, tuple[str, int | None]] = {}  # by number: how it ended, if it has and is not idle yet
        self._is_closing = False

    def order(self, order: Order) -> None:
        """From any thread: have ``order`` carried out soon."""
        self._orders.put(order)
        self._job.wake()

    def lead(self) -> None:
        """Serve until an order to close; then end the job."""
        while not self._is_closing:
            self.step()
        for number in self._served:
            self._job.deliver(Aborted(number))
        while self._served:
            self.step()
        self._job.close()

    def step(self) -> None:
        """Carry out orders, drive the job for one turn of its loop, pass its output on. Raises StallError, after asking
        every role what it is doing, if requests wait and nothing moves for the configured time."""
        while not self._orders.empty():
            self._carry_out(self._orders.get())
        commands = self._job.turn()
        while commands:
            self._report(*commands.popleft())
        if self._served and self._job.is_stalled and (report := self._job.explain()):
            raise StallError(report)

    def _carry_out(self, order: Order) -> None:
        if isinstance(order, Submit):
            self._served[order.number] = "", None
            self._pass_on(RequestOutput(time.monotonic(), number=order.number))
            self._job.deliver(Submitted(order.request, order.number))
        elif isinstance(order, Cancel):
            self._job.deliver(Aborted(order.number))
        else:
            self._is_closing = True

    def _report(self, at_s: float, command: Any) -> None:
        number = command.number
        if isinstance(command, Emit):
            load, tops = self._job.load, command.tops
            self._pass_on(RequestOutput(at_s, command.tokens, "", None, command.logps, tops, load, number))
        elif isinstance(command, Score):
            logps, tops = command.logps, command.tops
            self._pass_on(RequestOutput(at_s, logps=logps, tops=tops, number=number, is_of_prompt=True))
        elif isinstance(command, Finish):
            self._served[number] = command.reason, command.fault
        else:
            reason, fault = self._served.pop(number)
            self._pass_on(RequestOutput(at_s, reason=reason, stats=command.stats, number=number, fault=fault))


class LocalJob:
    """A job whose head is this process. ``fail`` ends the other ranks, if there are any; ``is_threaded``: whether a
    thread of its own drives it, or whoever waits."""

    def __init__(self, job: Job, is_threaded: bool, fail: Callable[[BaseException], object] | None = None) -> None:
        self._job, self._fail = job, fail
        self.is_threaded = is_threaded
        self.ranks = job.ranks
        self._requests = Requests()
        self._head = Head(job, self._requests.deliver)
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

    @property
    def failure(self) -> BaseException | None:
        """What has ended the job early, if something has."""
        return self._requests.failure

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

    def submit(self, request: Request, on_output: OnOutput) -> int:
        """From any thread: serve ``request``, whose output ``on_output`` takes; its number. Raises JobOver."""
        number = self._requests.open(on_output)
        self._head.order(Submit(number, request))
        return number

    def cancel(self, number: int) -> None:
        """From any thread: cancel request ``number``; its last output still comes."""
        self._head.order(Cancel(number))

    def wait(self, changed: threading.Condition, ready: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait, holding ``changed``, which is notified of what may change ``ready``; whether it is."""
        if self._thread is not None:
            return changed.wait_for(ready, timeout_s)
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
        """All output of ``request``, waited for. Raises the error that ended the job early."""
        outputs, changed = list[RequestOutput](), threading.Condition()

        def on_output(output: RequestOutput) -> None:
            with changed:
                outputs.append(output)
                changed.notify_all()

        self.submit(request, on_output)
        with changed:
            self.wait(changed, lambda: bool(outputs) and outputs[-1].is_last)
        if (error := outputs[-1].error) is not None:
            raise error
        return outputs

    def close(self) -> None:
        """End the job; raises the error that ended the job early, if any."""
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
