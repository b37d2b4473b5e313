"""The progress of a long command: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import os
import sys

import pytest

from pipeinfer.cli import progress
from pipeinfer.cli.progress import ProgressBar


def test_elsewhere_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    with ProgressBar(200) as bar:
        bar.tell(1, "one")
        assert said.getvalue() == ""
        monkeypatch.setattr(progress, "SAY_S", 0.0)
        bar.tell(50, "fifty")
    assert said.getvalue() == "pipeinfer: 25 %: fifty\n"


def test_a_terminal_shows_a_bar_and_is_clean_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(progress, "DRAW_S", 0.0)
    with os.fdopen(theirs, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        with ProgressBar(200) as bar:
            bar.tell(50, "fifty lines")
        screen.write("END")
        screen.flush()
        said = ""
        while not said.endswith("END"):  # a read may end where a write did
            said += os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "25 %" in said and "fifty lines" in said
    assert said.removesuffix("END").rstrip().endswith("\x1b[2K"), "the line is not cleared"
