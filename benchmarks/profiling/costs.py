"""A cost as it is measured and shown: microseconds of processor time, in which waiting and neighbours do not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from pipeinfer.core.metrics import percentile

COLUMNS = ("n", "median_us", "mean_us", "p99_us", "budget_us")
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cost:
    """What something takes, in microseconds, each time; ``budget_us`` is for the mean. ``is_per_token``: it is what one
    core spends on a token, so that 1e6 / mean tokens a second are the most that it can lead."""

    what: str
    us: Sequence[float] = field(repr=False)
    budget_us: float | None = None
    is_per_token: bool = False

    def row(self) -> dict[str, object]:
        """As a JSON object."""
        mean_us = statistics.fmean(self.us)
        return {
            "what": self.what,
            "n": len(self.us),
            "median_us": percentile(self.us, 0.5),
            "mean_us": mean_us,
            "p99_us": percentile(self.us, 0.99),
            "budget_us": self.budget_us,
            "ok": self.budget_us is None or mean_us <= self.budget_us,
            **({"ceiling_tokens_per_s": 1e6 / mean_us} if self.is_per_token else {}),
        }

    def line(self) -> str:
        """As a line of the table."""
        row = self.row()
        shown = "".join(f"{row[column]:>11.1f}" for column in COLUMNS[1:4])
        budget = f"{'-':>11}" if self.budget_us is None else f"{self.budget_us:>11.1f} {'yes' if row['ok'] else 'NO'}"
        ceiling = f"  at most {row['ceiling_tokens_per_s']:.0f} tokens/s" if self.is_per_token else ""
        return f"{self.what:<58}{len(self.us):>7}{shown}{budget}{ceiling}"


def heading() -> str:
    """What stands above the lines."""
    return f"# {'what':<56}{COLUMNS[0]:>7}" + "".join(f"{column:>11}" for column in COLUMNS[1:]) + " ok"


class Stopwatch:
    """Calls what it is given and keeps in ``us`` the processor time of this thread that each call took."""

    def __init__(self) -> None:
        self.us: list[float] = []
        self._reading_ns = 0
        for _ in range(1000):
            self(int)
        self._reading_ns = round(1e3 * min(self.us))  # of the clock, and of a call of nothing
        self.us.clear()

    def __call__(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        began = time.thread_time_ns()
        result = call(*args, **kwargs)
        self.us.append(1e-3 * (time.thread_time_ns() - began - self._reading_ns))
        return result
