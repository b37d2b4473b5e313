"""Signals that ask this process to end: they end it as an error does, so that ranks and files are not left behind."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from pipeinfer.core.errors import Terminated

ORDERLY_S = 15.0
"""An orderly end takes less. Whoever asks again so much later gets what the system does with the signal."""


class _Ending:
    def __init__(self) -> None:
        self._asked_s: float | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Raise Terminated, once: `timeout`, batch systems and MPICH's launcher send the same signal several times."""
        now = time.monotonic()
        if self._asked_s is None:
            self._asked_s = now
            Terminated.raised = Terminated(signum)
            raise Terminated.raised
        if now - self._asked_s > ORDERLY_S:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)


def end_in_order() -> Callable[[], None]:
    """From now on SIGTERM and SIGHUP raise Terminated in the main thread; what `nohup` ignores stays ignored, and so do
    handlers of the program's own. Returns what takes it back. Without effect on other threads than the main one."""
    ending, taken = _Ending(), list[int]()
    if threading.current_thread() is threading.main_thread():
        taken = [signum for signum in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(signum) is signal.SIG_DFL]
    for signum in taken:
        signal.signal(signum, ending)

    def take_back() -> None:
        Terminated.raised = None
        for signum in taken:
            if signal.getsignal(signum) is ending:
                signal.signal(signum, signal.SIG_DFL)

    return take_back


def end_undisturbed() -> None:
    """Ignore further termination signals, because this process is about to end."""
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
