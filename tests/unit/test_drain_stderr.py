"""Whoever ends a job waits until its words have been read, but not for ever. Time is virtual."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from launch import drain_stderr


class Clock:
    """Sleeping takes no time, but so much passes; ``read_at``: then somebody reads ``source``."""

    def __init__(self, source: int, read_at: float = math.inf) -> None:
        self.now, self._source, self._read_at = 0.0, source, read_at

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        if self.now < self._read_at <= self.now + seconds:
            assert os.read(self._source, 10) == b"why"
        self.now += seconds


@pytest.mark.parametrize(("read_at", "least", "most"), [(0.3, 0.3, 0.31), (math.inf, 1.0, 1.01)])
def test_it_waits_for_the_reader_of_a_pipe_but_not_for_ever(
    read_at: float, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, sink = os.pipe()
    clock = Clock(source, read_at)
    monkeypatch.setattr(drain_stderr, "time", clock)
    with os.fdopen(sink, "w") as stream:
        stream.write("why")
        drain_stderr.let_it_be_read(stream, 1.0)
    os.close(source)
    assert least <= clock.now <= most


def test_a_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(-1)
    monkeypatch.setattr(drain_stderr, "time", clock)
    with open(tmp_path / "log", "w", encoding="utf-8") as stream:
        stream.write("why")
        drain_stderr.let_it_be_read(stream, 60.0)
    assert clock.now == 0.0
