"""The time without progress of each rank, for a process that waits until several processes are ready.

Progress counts, not time: a rank that reads weights for an hour makes progress; a rank that neither reads nor computes
for ``timeout_s`` does not.
The watching process receives a number of each rank that changes while the rank works (see progress).
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeinfer.core.errors import StallError


@dataclass(slots=True)
class _Watched:
    name: str
    progress: int = -1
    heard_at: float = 0.0  # when its last report came
    moved_at: float = 0.0  # when its progress was last another one
    doing: str = "starting"


@dataclass(slots=True)
class Watch:
    """The ranks that are waited for, by number. ``timeout_s``: how long one may make no progress; 0: for ever."""

    timeout_s: float
    _watched: dict[int, _Watched] = field(default_factory=dict)
    _looked_at: float = math.inf

    def expect(self, rank: int, name: str, now: float) -> None:
        """Wait for ``rank``, which people know by ``name``, from ``now`` (seconds) on."""
        self._watched[rank] = _Watched(name, heard_at=now, moved_at=now)

    def heard(self, rank: int, progress: int, doing: str, now: float) -> None:
        """``rank`` is ``doing`` something, and its progress is this number."""
        watched = self._watched.get(rank)
        if watched is None:
            return
        watched.heard_at, watched.doing = now, doing
        if progress != watched.progress:
            watched.progress, watched.moved_at = progress, now

    def done(self, rank: int) -> None:
        """``rank`` need not be waited for any more."""
        self._watched.pop(rank, None)

    @property
    def is_over(self) -> bool:
        """Whether nobody is waited for."""
        return not self._watched

    def check(self, now: float) -> None:
        """Raise StallError, naming them, if ranks have made no progress for too long. Who did not look for long itself,
        stopped perhaps, knows nothing of the others, and waits anew."""
        if now - self._looked_at > self.timeout_s / 2:
            for watched in self._watched.values():
                watched.heard_at = watched.moved_at = now
        self._looked_at = now
        late = [watched for watched in self._watched.values() if now - watched.moved_at > self.timeout_s]
        if not self.timeout_s or not late:
            return
        state = "; ".join(
            f"{watched.name}, {watched.doing}, "
            + ("has not been heard of" if now - watched.heard_at > self.timeout_s else "neither reads nor computes")
            for watched in late[:8]
        )
        more = f" and {len(late) - 8} more" if len(late) > 8 else ""
        raise StallError(f"no progress for {self.timeout_s:g} s (--timeout allows more, 0 any time): {state}{more}")


def progress(pid: int | str = "self") -> int:
    """A number that grows while process ``pid``, of this host, computes or reads; -1 where it is not to be had.

    Of one's own process it is the main thread's, for a thread that looks would count itself."""
    place = f"/proc/{pid}" if pid != "self" else f"/proc/self/task/{threading.main_thread().native_id}"
    total = -1
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open(f"{place}/stat", "rb") as file:
            numbers = file.read().rpartition(b")")[2].split()
        total = int(numbers[11]) + int(numbers[12])  # user and system time, in ticks
        with contextlib.suppress(OSError, ValueError), open(f"{place}/io", "rb") as file:
            total += int(file.readline().split()[1])
    return total


class ProgressThread:
    """Calls ``report`` every ``period_s`` seconds in its own thread while the main thread is inside the ``with``."""

    def __init__(self, report: Callable[[], None], period_s: float) -> None:
        self._report, self._period_s = report, period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pipeinfer progress", daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self._report()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def name_of(rank: int, host: str, pid: int) -> str:
    """How a rank is named to people, who may want to look at it."""
    return f"rank {rank} (process {pid} on {host})" if pid else f"rank {rank}"


def here() -> tuple[str, int]:
    """This process as name_of wants it."""
    return os.uname().nodename, os.getpid()
