"""Progress of a long command on standard error: a bar on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from typing import Any

DRAW_S = 0.5
SAY_S = 60.0
"""Seconds between two lines where there is no terminal, or no rich to draw with."""


class ProgressBar:
    """A bar from 0 to ``total``, drawn while the ``with`` lasts. There is no thread: it is drawn when it is told of
    progress, and not more often than every DRAW_S. Without a terminal a line is written, at most every SAY_S."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._told_at = self._began_at = time.monotonic()
        self._bar: Any = None
        is_seen = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        if is_seen and importlib.util.find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            share, said = TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.description}")
            console = Console(file=sys.stderr)
            self._bar = Progress(BarColumn(20), share, said, console=console, auto_refresh=False, transient=True)
            self._task = self._bar.add_task("", total=total)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began_at

    def tell(self, done: int, text: str) -> None:
        """So much is done; ``text`` says more."""
        now = time.monotonic()
        if now - self._told_at < (SAY_S if self._bar is None else DRAW_S):
            return
        self._told_at = now
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=text, refresh=True)
        else:
            share = f"{100 * done / self._total:.0f} %: " if self._total else ""
            print(f"pipeinfer: {share}{text}", file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
