"""The line at the terminal's foot: it tells what is known, and the text above it is as it would be without it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from launch.requests import RequestOutput
from pipeinfer.cli.live import DRAW_S, Footline
from tests.cli.run import ROOT, here

DRAWING = re.compile(r"\x1b7\x1b\[(\d+);1H\x1b\[2K(.*?)\x1b8", re.DOTALL)
RESERVING = re.compile(r"\r?\n\x1b\[1A\x1b7\x1b\[1;(\d+)r\x1b8")
GIVING_BACK = re.compile(r"\x1b7\x1b\[r\x1b\[(\d+);1H\x1b\[2K\x1b8")
COLOUR = re.compile(r"\x1b\[[\d;]*m")
ARGUMENTS = ["--prompt", "def read_lines(path):\n", "--max-new-tokens", "80", "--ignore-eos", "--policy", "plain"]


@contextmanager
def terminal(lines: int = 24, columns: int = 100) -> Iterator[tuple[int, int]]:
    """Both ends of a terminal of that size: the person's and the program's."""
    ours, theirs = os.openpty()
    resize(theirs, lines, columns)
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def resize(end: int, lines: int, columns: int) -> None:
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))


def everything(ours: int) -> str:
    """What the program wrote until it closed its end."""
    said = b""
    while True:
        try:
            more = os.read(ours, 1 << 16)
        except OSError:  # Linux's way to say that the other end is closed
            return said.decode()
        said += more


def footlines(said: str) -> list[str]:
    return [COLOUR.sub("", line) for _, line in DRAWING.findall(said) if line]


def without_footlines(said: str) -> str:
    for part in (GIVING_BACK, DRAWING, RESERVING):
        said = part.sub("", said)
    return said


@pytest.fixture(autouse=True)
def term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")


def test_what_it_says_and_how_often() -> None:
    with terminal() as (ours, theirs):
        with os.fdopen(theirs, "w") as screen:
            line = Footline(screen, 200, 3)
            line.watch(RequestOutput(10.0))
            for step in range(21):  # 4 tokens every tenth of a second
                line.watch(RequestOutput(10.1 + 0.1 * step, (1, 2, 3, 4), load=(step % 3, step // 2, 0.5)))
            line.close()
        said = everything(ours)
    told = footlines(said)
    assert len(told) == 1 + int(2.1 / DRAW_S)
    assert re.search(r"0/200 tokens +0 runs in flight, 3 stages", told[0]), told[0]
    last = r"80/200 tokens +40\.0 tokens/s +accept length 8\.8 +1 run in flight, 3 stages"
    assert re.search(last, told[-1]), told[-1]
    assert without_footlines(said) == ""


def test_a_terminal_that_changes_its_size_is_asked_again() -> None:
    with terminal() as (ours, theirs):
        with os.fdopen(theirs, "w") as screen:
            line = Footline(screen, 200, 3)
            resize(theirs, 40, 30)
            line.watch(RequestOutput(0.0))
            line.watch(RequestOutput(9.0, (1,)))
            line.close()
        said = everything(ours)
    assert RESERVING.findall(said) == ["23", "39"]
    assert [line for line, _ in DRAWING.findall(said)][:2] == ["24", "40"]
    assert len(footlines(said)[-1]) <= 30
    assert GIVING_BACK.findall(said) == ["40"]


def test_a_low_terminal_is_left_alone() -> None:
    with terminal(lines=3) as (ours, theirs):
        with os.fdopen(theirs, "w") as screen:
            line = Footline(screen, 200, 3)
            line.watch(RequestOutput(0.0))
            line.watch(RequestOutput(9.0, (1,)))
            line.close()
        assert everything(ours) == ""


def watched(*more: str, stdout_too: bool, program: tuple[str, ...] = ("-m", "pipeinfer")) -> tuple[str, str]:
    """Run with standard error on a terminal: what stood there, and what went to a standard output elsewhere."""
    with terminal() as (ours, theirs):
        line = [sys.executable, *program, "run", *ARGUMENTS, *more]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        stdout = theirs if stdout_too else subprocess.PIPE
        with subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=stdout, stderr=theirs, env=env) as process:
            os.close(theirs)
            said = everything(ours)
            out = process.stdout.read().decode() if process.stdout else ""
            assert process.wait(300) == 0, said
    return said, out


@pytest.mark.slow
def test_the_text_is_not_touched() -> None:
    plain = here("run", *ARGUMENTS)
    alone, out = watched(stdout_too=False)
    assert out == plain.stdout
    assert footlines(alone)[0].startswith("━")
    together, _ = watched(stdout_too=True)
    assert "/80 tokens" in footlines(together)[-1]
    shown = without_footlines(together).replace("\r\n", "\n")
    assert plain.stdout in shown
    assert GIVING_BACK.findall(together) == ["24"]
    assert GIVING_BACK.search(together.partition("policy plain")[0]), "the table is not held to the region"


@pytest.mark.slow
def test_there_is_none_with_json_nor_without_rich() -> None:
    said, out = watched("--json", stdout_too=False)
    assert json.loads(out)["finish_reason"] == "length"
    assert "\x1b7" not in said
    program = "import sys; sys.modules['rich'] = None; from pipeinfer.cli import main; sys.exit(main(sys.argv[1:]))"
    said, _ = watched(stdout_too=True, program=("-c", program))
    assert "tokens/s" in said
    assert "\x1b7" not in said
