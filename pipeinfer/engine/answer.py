"""An answer: what was decoded, and the handle by which a program takes it while it is being decoded."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pipeinfer.core.errors import NotFiniteError, UserError
from pipeinfer.core.messages import TopToken
from pipeinfer.core.metrics import measure
from pipeinfer.core.ports import Request, RequestStats

if TYPE_CHECKING:
    from launch.requests import OnOutput, RequestOutput
    from pipeinfer.text import Reader


@dataclass(slots=True)
class Completion:
    """One answer. ``finish_reason``: ``stop``, ``length``, ``cancelled``, or ``error``, which ``error`` explains; then
    text and tokens are what there was. ``metrics`` are those of pipeinfer.core.metrics; ``calibrations`` what has
    been learnt of the sources' probabilities; ``ranks`` says who computed it; ``logprobs`` are those of ``tokens``
    (natural logarithm), by the model's logits before anything was done to them, and ``top_logprobs`` the most probable
    tokens in the place of each, if the sampling asked for some. ``prompt_logprobs`` and ``prompt_top_logprobs``: the
    same of ``prompt_tokens``, None and () for the first one, if the sampling asked for ``prompt_logprobs``.
    ``meaningless``: acceptance was forced, the models did not say these tokens."""

    text: str = ""
    prompt_tokens: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    calibrations: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[TopToken, ...]] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top_logprobs: list[tuple[TopToken, ...]] = field(default_factory=list)
    meaningless: bool = False


class HeadJob(Protocol):
    """A job as its head's program sees it: launch.head.LocalJob or launch.spawn.SpawnedJob."""

    ranks: list[dict[str, Any]]
    is_threaded: bool  # whether a thread of its own drives it

    @property
    def traffic(self) -> tuple[int, int]:
        """Messages and bytes between the ranks, once it is closed."""
        ...

    @property
    def failure(self) -> BaseException | None:
        """What has ended it early, if something has."""
        ...

    def submit(self, request: Request, on_output: OnOutput) -> int:
        """Serve ``request``; its number."""
        ...

    def cancel(self, number: int) -> None:
        """No more of it is wanted."""
        ...

    def wait(self, changed: threading.Condition, ready: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait, holding ``changed``, until ``ready()``; whether it is."""
        ...

    def close(self) -> None:
        """Let the ranks go."""
        ...

    def kill(self) -> None:
        """End them now."""
        ...


class Handle:
    """An answer being decoded, usable from any thread: iterate its pieces of text (``async for`` too), wait for the
    whole by ``result`` (or ``await``), give it up by ``cancel``. Pieces wait for whoever takes them, once each.

    Raises, where pieces or the result are taken, what has ended the answer early: NotFiniteError for a model whose
    numbers are not finite, StallError and others for a job that broke; ``completion`` then has what there was."""

    def __init__(
        self,
        job: HeadJob,
        request: Request,
        reader: Reader,
        completion: Completion,
        watch: Callable[[RequestOutput], None] | None = None,
    ) -> None:
        self.completion = completion
        self._job = job
        self._reader = reader
        self._watch = watch
        self._changed = threading.Condition()
        self._pieces: deque[tuple[str, RequestOutput]] = deque()
        self._listeners: list[Callable[[], object]] = []
        self._takers = 0  # threads that wait for the next piece
        self._submitted_at: float | None = None
        self._emitted_at: list[tuple[float, int]] = []
        self._stats: RequestStats | None = None
        self._error: BaseException | None = None
        self._is_over = False
        if request.sampling.prompt_logprobs is not None:
            completion.prompt_logprobs, completion.prompt_top_logprobs = [None], [()]
        self._number = job.submit(request, self._received)

    # On the thread that drives the job.

    def _received(self, output: RequestOutput) -> None:
        """Take an output of the job; never waits."""
        with self._changed:
            if self._is_over:
                return
            try:
                piece = self._read(output)
            except Exception as error:  # this answer's affair: the job goes on
                self._job.cancel(output.number)
                piece = self._end("error", error)
            self._pieces.append((piece, output))
            if self._takers or self._is_over:  # who waits for the whole is not woken for each piece
                self._changed.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def _read(self, output: RequestOutput) -> str:
        if self._submitted_at is None:
            self._submitted_at = output.at_s
        piece, completion = "", self.completion
        if output.is_of_prompt:
            completion.prompt_logprobs += output.logps
            completion.prompt_top_logprobs += output.tops or [()] * len(output.logps)
        if output.tokens and not self._reader.is_stopped:
            count, piece = self._reader.read(output.tokens)
            completion.tokens += output.tokens[:count]
            completion.logprobs += output.logps[:count]
            completion.top_logprobs += output.tops[:count]
            self._emitted_at.append((output.at_s, count))
            if self._reader.is_stopped:
                self._job.cancel(output.number)
        self._stats = output.stats or self._stats
        if output.error is not None:
            piece += self._end("error", output.error)
        elif output.fault is not None:
            piece += self._end("error", self._not_finite(output.fault))
        elif output.stats is not None:
            piece += self._end({"aborted": "cancelled"}.get(output.reason, output.reason))
        return piece

    def _end(self, reason: str, error: BaseException | None = None) -> str:
        """The answer is over; the last of its text."""
        completion = self.completion
        piece = self._reader.close()
        completion.text = self._reader.shown
        completion.finish_reason = "stop" if self._reader.is_stopped else reason
        completion.error = str(error) or type(error).__name__ if error is not None else ""
        if self._stats is not None:
            completion.calibrations = self._stats.calibrations
        if self._emitted_at:
            completion.metrics = measure(self._submitted_at or 0.0, self._emitted_at, self._stats or RequestStats())
        self._error, self._is_over = error, True
        return piece

    def _not_finite(self, fault: int) -> NotFiniteError:
        """What to say of a row whose numbers layer ``fault`` spoilt."""
        holders = [rank for rank in self._job.ranks if rank["layers"] is not None]
        rank = next((rank for rank in holders if rank["layers"][0] <= fault <= rank["layers"][1]), holders[-1])
        place = f"layer {fault}" if fault <= rank["layers"][1] else "the output head"
        return NotFiniteError(
            f"the target's numbers are not finite: {place}, on rank {rank['rank']} ({rank['host']}), says NaN or "
            "infinity; the weights are damaged, or too large for --dtype"
        )

    # On any thread.

    def interrupt(self, error: BaseException) -> None:
        """Whoever waits was interrupted by ``error``: the answer ends with what there is."""
        with self._changed:
            if not self._is_over:
                self._end("error", error)

    def cancel(self) -> None:
        """No more is wanted. What was decoded stays; the result then says ``cancelled``."""
        self._job.cancel(self._number)

    def result(self, timeout_s: float | None = None) -> Completion:
        """The whole answer, waited for. Raises TimeoutError where that takes longer than ``timeout_s``."""
        with self._changed:
            if not self._job.wait(self._changed, lambda: self._is_over, timeout_s):
                raise TimeoutError(f"the answer is not whole after {timeout_s:g} s")
            if self._error is not None:
                raise self._error
            return self.completion

    def __iter__(self) -> Iterator[str]:
        while True:
            with self._changed:
                self._takers += 1
                try:
                    self._job.wait(self._changed, self._has_changed)
                finally:
                    self._takers -= 1
                taken = self._take()
            if taken is None:
                return
            piece, output = taken
            if self._watch is not None:
                self._watch(output)
            if piece:
                yield piece

    def _has_changed(self) -> bool:
        return bool(self._pieces) or self._is_over

    def _take(self) -> tuple[str, RequestOutput] | None:
        """The next piece; None where there is none any more. Raises what has ended the answer."""
        if self._pieces:
            return self._pieces.popleft()
        if self._error is not None:
            raise self._error
        return None

    async def __aiter__(self) -> AsyncIterator[str]:
        if not self._job.is_threaded:
            raise UserError("this MPI grants one thread only, so that an answer is taken with a plain `for`")
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._listeners.append(listener)
        try:
            while True:
                with self._changed:
                    taken = self._take() if self._has_changed() else ()
                    changed.clear()
                if taken is None:
                    return
                if not taken:
                    await changed.wait()
                    continue
                piece, output = taken
                if self._watch is not None:
                    self._watch(output)
                if piece:
                    yield piece
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._whole().__await__()

    async def _whole(self) -> Completion:
        async for _ in self:
            pass
        return self.result()
