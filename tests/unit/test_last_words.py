"""Whoever ends a job waits until its words have been read, but not for ever."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from launch.last_words import let_it_be_read


def test_it_waits_for_the_reader_of_a_pipe() -> None:
    source, sink = os.pipe()
    with os.fdopen(sink, "w") as stream:
        stream.write("why")
        done = threading.Event()

        def speak() -> None:
            let_it_be_read(stream, 60.0)
            done.set()

        speaker = threading.Thread(target=speak)
        speaker.start()
        assert not done.wait(0.05)
        assert os.read(source, 10) == b"why"
        assert done.wait(30.0)
        speaker.join()
    os.close(source)


def test_it_waits_for_nobody_for_ever(tmp_path: Path) -> None:
    source, sink = os.pipe()
    with os.fdopen(sink, "w") as stream:
        stream.write("why")
        began = time.monotonic()
        let_it_be_read(stream, 0.05)
        assert 0.05 <= time.monotonic() - began < 30.0
    os.close(source)
    began = time.monotonic()
    with open(tmp_path / "log", "w", encoding="utf-8") as stream:
        stream.write("why")
        let_it_be_read(stream, 60.0)
    assert time.monotonic() - began < 30.0
