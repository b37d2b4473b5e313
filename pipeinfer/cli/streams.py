"""The standard streams of the command line: all three are open, the encoding is UTF-8 in every locale, and failures of
standard output raise OutputError."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from typing import Any

from launch.environment import launched
from launch.failure import write
from pipeinfer.core.errors import PipeinferError

STDIN, STDOUT, STDERR = 0, 1, 2


class OutputError(PipeinferError):
    """Standard output cannot be written: a full disk, or a reader that has exited; the latter is not reported."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"standard output cannot be written ({cause.strerror})")
        self.is_told = cause.errno == errno.EPIPE
        self.exit_code = 141 if self.is_told else 1  # 128 + SIGPIPE, which is how other programs end there


class _Patient(io.FileIO):
    """A descriptor that another process may have set to non-blocking; writes wait here."""

    def write(self, data: Any, /) -> int:
        while (written := super().write(data)) is None:
            select.select([], [self], [])
        return written


class _Output(_Patient):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error) from None


class _Errors(_Patient):
    """Messages that cannot be written are dropped."""

    def write(self, data: Any, /) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return memoryview(data).nbytes


def put_in_place() -> None:
    """Open what is closed, and take the place of ``sys.stdout`` and ``sys.stderr`` where they are still Python's."""
    for descriptor in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free: this one
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(STDIN, closefd=False)), "utf-8", "surrogateescape")
    if sys.stdout is sys.__stdout__:
        raw = _Output(STDOUT, "w", closefd=False)
        sys.stdout = _in_utf8(raw, line_buffering=raw.isatty())
    if sys.stderr is sys.__stderr__:
        sys.stderr = _in_utf8(_Errors(STDERR, "w", closefd=False), line_buffering=True)


def _in_utf8(raw: io.FileIO, line_buffering: bool) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace", line_buffering=line_buffering)


def drop_output() -> None:
    """Discard the buffered standard output, so that Python reports no error at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, STDOUT)
    os.close(null)


def insist_on_utf8() -> None:
    """Start this process again where Python takes arguments and file names for ASCII (LC_ALL=C with its UTF-8 mode
    forbidden): the mode is chosen at the start."""
    is_ascii = codecs.lookup(sys.getfilesystemencoding()).name == "ascii"
    if not is_ascii or not sys.executable or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def say(message: str) -> None:
    """One line on standard error, from the leading rank only."""
    launch = launched()
    if launch is None or launch.leads:
        write(f"pipeinfer: {message}")
