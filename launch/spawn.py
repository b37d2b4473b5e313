"""A job on ranks that we start ourselves: mpiexec runs worker.py on this machine, and its rank 0 talks to us.

The two talk in lines of JSON over a socket in a private directory: a request one way, or an empty object when the rest
of it is not wanted; its news the other way. Standard output stays free for whoever uses the engine; what ranks say on
standard error passes through.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import mpiexec
from launch.job import News
from launch.lines import Lines
from pipeinfer.config import Config
from pipeinfer.errors import PipeinferError
from pipeinfer.ports import Request, Tally

START_S = 300.0
"""Longest wait for all ranks to load their models."""
GRACE_S = 10.0
"""Longest wait for ranks to leave once they were told to."""


class RanksFailed(PipeinferError):
    """The ranks ended on their own; what they said is on standard error already."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the ranks ended with exit code {exit_code}; their own words are above")
        self.exit_code = exit_code


class SpawnedJob:
    """``ranks`` ranks on this machine serving ``config``; the same interface as Job on the head, but that nobody tells
    their ``traffic``."""

    traffic = (0, 0)

    def __init__(self, config: Config, ranks: int) -> None:
        self._held = contextlib.ExitStack()  # directory and sockets: let go together
        place = self._held.enter_context(tempfile.TemporaryDirectory(prefix="pipeinfer-"))
        path = os.path.join(place, "head")
        listener = self._held.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(1)
        program = [sys.executable, "-m", "launch.worker", path, json.dumps(asdict(config))]
        line, environ = mpiexec.command(ranks, program)
        root = str(Path(__file__).resolve().parents[1])  # a bare checkout works without being installed
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
        # A group of its own, so that an interrupt reaches the ranks through us, once.
        self._process = subprocess.Popen(line, env=environ, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)
        try:
            self._lines = Lines(self._held.enter_context(self._accept(listener)))
            self.ranks: list[dict[str, Any]] = self._hear()["ranks"]
        except BaseException:
            self.kill()
            raise

    def _accept(self, listener: socket.socket) -> socket.socket:
        listener.settimeout(0.1)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                return listener.accept()[0]
            if self._process.poll() is not None:
                raise RanksFailed(self._process.returncode or 1)
        raise PipeinferError(f"the ranks were not ready after {START_S:g} s")

    def _hear(self) -> dict[str, Any]:
        """The next word of rank 0; raises RanksFailed if there will be none."""
        if (said := self._lines.hear()) is not None:
            return said
        try:
            code = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            code = 1
        self.kill()
        raise RanksFailed(code or 1)

    def submit(self, request: Request) -> Iterator[News]:
        """See Job."""
        words = {
            "prompt": request.prompt,
            "max_new_tokens": request.max_new_tokens,
            "stop": sorted(request.stop_tokens),
            "sampling": asdict(request.sampling),
        }
        self._say(words)
        tally = None
        try:
            while tally is None:
                said = self._hear()
                tally = Tally(**said["tally"]) if said["tally"] else None
                lists = {name: tuple(said[name]) for name in ("tokens", "logps", "pulse")}
                yield News(said["at_s"], reason=said["reason"], tally=tally, **lists)
        except GeneratorExit:  # nobody wants the rest
            if tally is None:
                self.withdraw()
            while tally is None:
                tally = self._hear()["tally"]
            raise

    def withdraw(self) -> None:
        """See Job."""
        self._say({})

    def _say(self, words: dict[str, Any]) -> None:
        with contextlib.suppress(ConnectionError):  # rank 0 is gone: the next hearing says so
            self._lines.say(words)

    def close(self) -> None:
        """Let the ranks go."""
        self._let_go()
        try:
            code = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise PipeinferError(f"the ranks did not end within {GRACE_S:g} s and were stopped") from None
        if code:
            raise RanksFailed(code)

    def _let_go(self) -> None:
        with contextlib.suppress(OSError):  # rank 0 may have gone first
            self._held.close()

    def kill(self) -> None:
        """Stop the ranks, now."""
        self._let_go()
        if self._process.poll() is None:
            self._process.terminate()  # mpiexec takes its ranks along
            try:
                self._process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
