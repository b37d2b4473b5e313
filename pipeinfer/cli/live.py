"""A status line on the terminal's last line while decoding: speed, tokens per correction, runs in flight.

The terminal's last line is excluded from scrolling. The text streams above the line, on the same terminal or elsewhere,
and does not pass through this module. The line is drawn at most every DRAW_S, and only when output of the job arrives,
to save rank 0's time: there is no thread, no timer and no clock. Drawing takes a millisecond. The first drawing takes
longer and comes before the request.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from launch.requests import RequestOutput
    from pipeinfer.engine.engine import Engine

DRAW_S = 0.5
LEAST_LINES = 4
"""A terminal with fewer lines gets no status line."""
SAVE, RESTORE, UP, CLEAR, SCROLL_ALL = "\x1b7", "\x1b8", "\x1b[1A", "\x1b[2K", "\x1b[r"


@contextlib.contextmanager
def live(engine: Engine, most_tokens: int) -> Iterator[Callable[[RequestOutput], None] | None]:
    """A callback for the output of a request of up to ``most_tokens`` tokens; None without a terminal or without
    rich."""
    terminal = sys.stderr
    is_seen = terminal.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if not is_seen or importlib.util.find_spec("rich") is None:
        yield None
        return
    stages = sum(rank["layers"] is not None for rank in engine.ranks)
    with contextlib.closing(Footline(terminal, most_tokens, stages)) as line:
        yield line.watch


class Footline:
    """The last line of ``terminal``, about an answer of up to ``most_tokens`` tokens from ``stages`` stages."""

    def __init__(self, terminal: TextIO, most_tokens: int, stages: int) -> None:
        from rich.console import Console

        from launch.requests import RequestOutput

        self._terminal = terminal
        self._console = Console(file=terminal)
        self._most_tokens = most_tokens
        self._stages = stages
        self._tokens = 0
        self._began: tuple[float, int] | None = None  # the first emission: when, tokens
        self._drawn_s: float | None = None
        self._size = os.terminal_size((0, 0))
        self._draw(RequestOutput(0.0))

    def watch(self, output: RequestOutput) -> None:
        """Take output of the job."""
        self._tokens += len(output.tokens)
        if output.tokens and self._began is None:
            self._began = output.at_s, len(output.tokens)
        if self._drawn_s is None:
            self._drawn_s = output.at_s
        elif output.stats is None and output.at_s - self._drawn_s >= DRAW_S:
            self._drawn_s = output.at_s
            self._draw(output)

    def _parts(self, output: RequestOutput) -> list[str]:
        began_s, first = self._began or (output.at_s, 0)
        elapsed_s = output.at_s - began_s
        runs, verifications, _ = output.load
        return [
            f"{self._tokens}/{self._most_tokens} tokens",
            f"{(self._tokens - first) / elapsed_s:.1f} tokens/s" if elapsed_s else "",
            f"accept length {(self._tokens - 1) / verifications:.1f}" if verifications else "",
            f"{runs} run{'' if runs == 1 else 's'} in flight, {self._stages} stage{'' if self._stages == 1 else 's'}",
        ]

    def _draw(self, output: RequestOutput) -> None:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        self._reserve()
        if not self._size.lines:
            return
        parts = self._parts(output)
        table = Table.grid(padding=(0, 3, 0, 0))
        for _ in range(1 + len(parts)):
            table.add_column(no_wrap=True)
        table.add_row(ProgressBar(self._most_tokens, self._tokens, width=20), *parts)
        self._console.width = self._size.columns
        with self._console.capture() as drawn:
            self._console.print(table, end="")
        line = drawn.get().partition("\n")[0]
        self._say(f"{SAVE}\x1b[{self._size.lines};1H{CLEAR}{line}{RESTORE}")

    def _reserve(self) -> None:
        """Keep the last line from scrolling, once for each size that the terminal has."""
        size = os.get_terminal_size(self._terminal.fileno())
        if size != self._size and size.lines >= LEAST_LINES:
            self._size = size
            # A new line first, which moves the last line up. Setting the region moves the cursor.
            self._say(f"\n{UP}{SAVE}\x1b[1;{size.lines - 1}r{RESTORE}")

    def close(self) -> None:
        """Clear the line and end its exclusion from scrolling."""
        if self._size.lines:
            self._say(f"{SAVE}{SCROLL_ALL}\x1b[{self._size.lines};1H{CLEAR}{RESTORE}")

    def _say(self, text: str) -> None:
        self._terminal.write(text)
        self._terminal.flush()
