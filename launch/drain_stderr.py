"""Draining standard error: a launcher that kills a job may drop output of ranks that it has not read yet."""

from __future__ import annotations

import contextlib
import fcntl
import sys
import termios
import time
from typing import TextIO

LONGEST_S = 1.0
GLANCE_S = 1e-3


def let_it_be_read(stream: TextIO, longest_s: float = LONGEST_S) -> None:
    """Wait until the reader of the pipe behind ``stream`` has taken all that was written; at most ``longest_s``."""
    stream.flush()
    until = time.monotonic() + longest_s
    with contextlib.suppress(OSError, ValueError):  # no pipe, or no file at all
        while time.monotonic() < until:
            unread = fcntl.ioctl(stream.fileno(), termios.FIONREAD, bytes(4))
            if not int.from_bytes(unread, sys.byteorder):
                return
            time.sleep(GLANCE_S)
