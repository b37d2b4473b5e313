"""Who is named for making no progress: never one that reads, computes or was ready; never by one that slept itself."""

from __future__ import annotations

import os
import time

import pytest

from launch.watch import Watch, progress
from pipeinfer.core.errors import StallError


def watch(*ranks: int, timeout_s: float = 10.0) -> Watch:
    watching = Watch(timeout_s)
    for rank in ranks:
        watching.expect(rank, f"rank {rank}", 0.0)
    return watching


def look(watching: Watch, until: int, **moves: int) -> None:
    """A look each second up to ``until``; rank N moves every ``rN`` seconds, and is heard in between."""
    for second in range(until + 1):
        for name, every in moves.items():
            watching.heard(int(name[1:]), second // every, "loading", second)
        watching.check(second)


def test_who_moves_is_waited_for_as_long_as_it_takes() -> None:
    look(watch(1, 2), 1000, r1=1, r2=9)


def test_who_does_not_move_is_named_and_so_is_who_is_silent() -> None:
    with pytest.raises(StallError, match="no progress for 10 s .*--timeout") as said:
        look(watch(1, 2), 1000, r1=1, r2=10**6)
    assert "rank 2, loading, neither reads nor computes" in str(said.value)
    assert "rank 1" not in str(said.value)
    with pytest.raises(StallError, match="rank 2, starting, has not been heard of"):
        look(watch(1, 2), 1000, r1=1)


def test_who_is_ready_is_not_waited_for() -> None:
    watching = watch(1, 2)
    watching.done(2)
    look(watching, 100, r1=1)
    assert not watching.is_over
    watching.done(1)
    assert watching.is_over
    watching.heard(1, 5, "late", 200.0)
    watching.check(200.0)


def test_a_timeout_of_0_is_for_ever() -> None:
    look(watch(1, timeout_s=0.0), 10**4)


def test_a_watcher_that_was_stopped_itself_blames_nobody() -> None:
    watching = watch(1)
    look(watching, 5, r1=1)
    watching.check(1000.0)
    watching.check(1004.0)
    watching.check(1008.0)
    with pytest.raises(StallError):
        watching.check(1012.0)


def test_progress_is_what_the_main_thread_computes_and_reads() -> None:
    before, other = progress(), progress(os.getpid())
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    assert progress() > before >= 0
    assert progress(os.getpid()) > other >= 0
    assert progress(2**22 + 1) == -1  # no such process
