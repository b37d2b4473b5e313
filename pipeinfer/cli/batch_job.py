"""A batch being decoded: several requests are with the engine at a time; each answer is written when it is whole."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from pipeinfer.cli.batch_lines import Line, answer_line, error_line
from pipeinfer.cli.batch_output import BatchOutput
from pipeinfer.cli.batch_request import BatchRequest
from pipeinfer.core.errors import Terminated
from pipeinfer.engine.engine import Engine
from pipeinfer.serve.errors import ApiError

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
"""What asks a batch to end. Slurm sends SIGTERM, or with --signal what a user wants."""
FLUSH_S = 5.0
"""How long cancelled requests have to end after a signal."""


@dataclass(slots=True)
class Counts:
    """Lines by what became of them, and tokens of prompts and answers. ``nbytes``: how far the input was read."""

    skipped: int = 0
    answered: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    nbytes: int = 0


class BatchJob:
    """Has ``engine`` decode ``lines``, ``concurrency`` at a time, and appends the answers to ``output``. ``model``: its
    name in requests and answers. ``on_progress`` is called with the counts after each line."""

    def __init__(
        self,
        engine: Engine,
        lines: Iterator[Line],
        output: BatchOutput,
        model: str,
        concurrency: int,
        on_progress: Callable[[Counts], object],
    ) -> None:
        self._engine, self._lines, self._output = engine, lines, output
        self._model, self._concurrency, self._on_progress = model, concurrency, on_progress
        self._running = list[BatchRequest]()  # in the order in which they were submitted
        self._wake: Callable[[], object] | None = None
        self.signum = 0  # the signal that has asked for the end
        self.counts = Counts()

    def run(self) -> None:
        """Decode until no line is left, or until a signal: then what runs is cancelled, and ``signum`` is set. On the
        main thread. Raises what has ended the engine's job, and Terminated if requests do not end."""
        with self._signals():
            if self._engine.is_threaded:
                asyncio.run(self._run_clients())
            else:
                self._run_alone()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first of SIGNALS is noted, and later ones are ignored: batch systems and launchers send them again."""

        def asked(signum: int, frame: FrameType | None) -> None:
            if not self.signum:
                self.signum = signum
                if self._wake is not None:
                    self._wake()

        with contextlib.ExitStack() as held:
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:  # by nohup
                    held.callback(signal.signal, signum, signal.signal(signum, asked))
            yield

    async def _run_clients(self) -> None:
        loop = asyncio.get_running_loop()
        clients = [loop.create_task(self._client()) for _ in range(self._concurrency)]

        def end() -> None:
            self._cancel_all()
            loop.call_later(FLUSH_S, lambda: [client.cancel() for client in clients])

        self._wake = lambda: loop.call_soon_threadsafe(end)
        try:
            await asyncio.gather(*clients)
        except asyncio.CancelledError:
            raise Terminated(self.signum) from None
        finally:
            self._wake = None

    async def _client(self) -> None:
        while (one := self._begin()) is not None:
            await one.wait()
            self._finish(one)

    def _run_alone(self) -> None:
        """As _run_clients, for an engine that is driven by whoever waits for an answer: the oldest is waited for."""
        self._wake = self._cancel_all
        while True:
            while len(self._running) < self._concurrency and self._begin() is not None:
                pass
            if not self._running:
                return
            if self.signum:
                self._cancel_all()
            self._running[0].drive()
            for one in [one for one in self._running if one.is_over]:
                one.drive()  # at once; its pieces have not been taken
                self._finish(one)

    def _begin(self) -> BatchRequest | None:
        """Submit the next line that the engine takes; None if there is none, or no more is wanted. Lines that it does
        not take are answered here."""
        while not self.signum and (line := next(self._lines, None)) is not None:
            self.counts.nbytes = line.end
            if line.custom_id in self._output.answered:
                self.counts.skipped += 1
                continue
            try:
                one = BatchRequest(self._engine, line, self._model)
            except ApiError as error:
                self._raise_failure()
                self._write_error(line, error)
                continue
            self._running.append(one)
            return one
        return None

    def _finish(self, one: BatchRequest) -> None:
        """Write the answer, unless it was cancelled. Raises what has ended the engine's job."""
        self._running.remove(one)
        failed = next((done for done in one.completions if done.finish_reason == "error"), None)
        if failed is not None:
            self._raise_failure()
            self._write_error(one.line, ApiError(500, failed.error))
        elif all(done.finish_reason != "cancelled" for done in one.completions):
            body = one.body()
            self._output.append(answer_line(one.line, body))
            self.counts.answered += 1
            self.counts.prompt_tokens += body["usage"]["prompt_tokens"]
            self.counts.tokens += body["usage"]["completion_tokens"]
            self._on_progress(self.counts)

    def _write_error(self, line: Line, error: ApiError) -> None:
        self._output.append(error_line(line, error))
        self.counts.errors += 1
        self._on_progress(self.counts)

    def _raise_failure(self) -> None:
        if self._engine.failure is not None:
            raise self._engine.failure

    def _cancel_all(self) -> None:
        for one in list(self._running):
            one.cancel()
