"""A job on ranks that this process starts: mpiexec runs worker.py on this machine.

Every rank connects to a socket of ours before it does anything that may take long, receives the job's Config, and sends
when MPI has joined it; until then we watch that it makes progress. Then requests go to rank 0, and outputs come back
(see wire_forms.py). Standard output stays free for the program that uses the engine; standard error of the ranks passes
through.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import mpiexec
from launch.json_channel import JsonChannel, is_ours, listen
from launch.requests import Cancel, Close, OnOutput, Requests, Submit
from launch.watch import Watch, here, name_of, progress
from launch.wire_forms import order_to_dict, output_from_dict
from pipeinfer.core.config import Config
from pipeinfer.core.errors import PipeinferError, StallError
from pipeinfer.core.ports import Request

GRACE_S = 10.0
"""Longest wait for ranks to leave once they were signalled to stop at once."""
LOOK_S = 0.2


class RanksFailed(PipeinferError):
    """The ranks ended on their own. ``reason``: what one of them gave for it, on standard error already."""

    def __init__(self, code: int, reason: str) -> None:
        cause = reason or "they did not report why; out of memory, perhaps, or see the launcher's message above"
        super().__init__(f"the ranks ended with exit code {code}: {cause}")
        self.exit_code, self.is_told = code, bool(reason)


class SpawnedJob:
    """``ranks`` ranks on this machine serving ``config``; the same interface as LocalJob, but that nobody tells their
    ``traffic``."""

    traffic = (0, 0)
    is_threaded = True

    def __init__(self, config: Config, ranks: int) -> None:
        self._requests = Requests()
        self._held = contextlib.ExitStack()  # sockets: let go together
        self._selector = self._held.enter_context(selectors.DefaultSelector())
        self._lines: dict[int, JsonChannel] = {}  # by rank
        self._failure = ""  # the reason that a failed rank gave
        self._config = config
        self._reader: threading.Thread | None = None
        self.ranks: list[dict[str, Any]] = []
        listener, name = listen()
        self._selector.register(self._held.enter_context(listener), selectors.EVENT_READ)
        line, environ = mpiexec.command(ranks, [sys.executable, "-P", "-m", "launch.worker", name])
        root = str(Path(__file__).resolve().parents[1])  # a bare checkout works without being installed
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
        # A group of its own, so that an interrupt reaches the ranks through us, once.
        self._process = subprocess.Popen(
            line, env=environ, stdin=subprocess.DEVNULL, stdout=_standard_error(), start_new_session=True
        )
        try:
            self._await(ranks)
        except BaseException:
            self.kill()
            raise
        self._reader = threading.Thread(target=self._read, name="pipeinfer reader", daemon=True)
        self._reader.start()

    def _await(self, ranks: int) -> None:
        """Until all ranks are ready. Raises RanksFailed, or StallError for one that makes no progress. A rank that
        waits for others inside MPI computes, so once all have entered MPI, computing is no progress."""
        watch, pids = Watch(self._config.timeout_s), dict[int, int]()
        entered = set[int]()
        for rank in range(ranks):
            watch.expect(rank, name_of(rank, "", 0), time.monotonic())
        while not self.ranks:
            for rank, message in self._received(LOOK_S):
                if message is None:
                    self._ended()
                elif "pid" in message:
                    pids[rank] = message["pid"]
                    watch.expect(rank, name_of(rank, here()[0], message["pid"]), time.monotonic())
                elif "joining" in message:
                    entered.add(rank)
                    watch.heard(rank, progress(pids[rank]), "starting MPI", time.monotonic())
                elif "joined" in message:  # from here on the ranks watch each other
                    watch.done(rank)
                self.ranks = (message or {}).get("ranks", self.ranks)
            for rank, pid in pids.items() if len(entered) < ranks else ():
                doing = "starting MPI" if rank in entered else "starting"
                watch.heard(rank, progress(pid), doing, time.monotonic())
            watch.check(time.monotonic())
            if self._process.poll() is not None:
                self._ended()

    def _received(self, most_s: float | None) -> Iterator[tuple[int, dict[str, Any] | None]]:
        """The messages of ranks, each with the rank's number, or None where a rank has gone. Waits up to ``most_s``."""
        for key, _ in self._selector.select(most_s):
            if key.data is None:
                self._accept(key.fileobj)  # type: ignore[arg-type]
                continue
            lines, rank = key.data
            while True:
                message = lines.receive()
                if message is None:
                    self._selector.unregister(key.fileobj)
                    if rank is not None:
                        yield rank, None
                    break
                if rank is None:  # its first message
                    rank = message["rank"]
                    self._lines[rank] = lines
                    self._selector.modify(key.fileobj, selectors.EVENT_READ, (lines, rank))
                    lines.try_to_send({"config": asdict(self._config)})
                self._failure = self._failure or message.get("failed", "")
                yield rank, message
                if not lines.is_readable:
                    break

    def _accept(self, listener: socket.socket) -> None:
        wire = listener.accept()[0]
        if is_ours(wire):
            self._held.enter_context(wire)
            self._selector.register(wire, selectors.EVENT_READ, (JsonChannel(wire), None))
        else:
            wire.close()

    def _ended(self) -> None:
        """A rank has gone, so all will: receive what they still send, and raise RanksFailed."""
        until = time.monotonic() + GRACE_S
        while self._process.poll() is None and time.monotonic() < until:
            for _ in self._received(LOOK_S):
                pass
        for _ in self._received(0):
            pass
        code = self._process.poll()
        self.kill()
        raise RanksFailed(128 - code if code is not None and code < 0 else code or 1, self._failure)

    def _read(self) -> None:
        """In a thread: pass rank 0's output on, until it has gone."""
        try:
            while True:
                for rank, message in self._received(None):
                    if message is None and rank in self._lines:
                        if self._requests.is_closing:
                            return
                        self._ended()
                    if message is not None and "output" in message:
                        self._requests.deliver(output_from_dict(message["output"]))
        except BaseException as error:
            self._requests.fail(error, time.monotonic())

    @property
    def failure(self) -> BaseException | None:
        """See LocalJob."""
        return self._requests.failure

    def submit(self, request: Request, on_output: OnOutput) -> int:
        """See LocalJob."""
        number = self._requests.open(on_output)
        self._lines[0].try_to_send(order_to_dict(Submit(number, request)))  # the reading thread reports a lost rank 0
        return number

    def cancel(self, number: int) -> None:
        """See LocalJob."""
        self._lines[0].try_to_send(order_to_dict(Cancel(number)))

    def wait(self, changed: threading.Condition, ready: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """See LocalJob."""
        return changed.wait_for(ready, timeout_s)

    def close(self) -> None:
        """End the job."""
        failed = self._requests.close()
        if failed is not None:
            self.kill()
            raise failed
        self._lines[0].try_to_send(order_to_dict(Close()))
        timeout_s = self._config.timeout_s
        try:
            code = self._process.wait(timeout_s or None)
        except subprocess.TimeoutExpired:
            self.kill()
            raise StallError(f"the ranks have not ended within {timeout_s:g} s, and were stopped") from None
        self._release()
        if code:
            raise RanksFailed(code, self._failure)

    def kill(self) -> None:
        """Stop the ranks, now."""
        self._requests.close()
        for lines in self._lines.values():
            with contextlib.suppress(OSError):
                lines.wire.shutdown(socket.SHUT_RDWR)
        if self._process.poll() is None:
            self._process.terminate()  # mpiexec ends its ranks
            try:
                self._process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._release()

    def _release(self) -> None:
        """Let the sockets go; the ranks have gone, so that nobody listens to them for long."""
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(GRACE_S)
        self._held.close()


def _standard_error() -> int:
    """Where ranks may write that are not to write to standard output; a program may have closed it."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2
