"""Samples: the measurement of one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeinfer.core.metrics import measure
from pipeinfer.core.ports import RequestStats


@dataclass(frozen=True, slots=True)
class Sample:
    """``metrics``: those of pipeinfer.core.metrics. ``messages`` and ``nbytes``: what ranks sent each other, per token
    of the job; 0 where there are no ranks."""

    tokens: tuple[int, ...]
    metrics: dict[str, Any]
    messages: float = 0.0
    nbytes: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens per second after the first."""
        return 1e3 / float(self.metrics["tpot_ms"])


def sample(
    tokens: Sequence[int],
    submitted_at: float,
    emitted_at: Sequence[tuple[float, int]],
    stats: RequestStats,
    traffic: tuple[int, int] = (0, 0),
) -> Sample:
    """A sample of a job that served this request only; ``traffic`` as a Job counts it."""
    messages, nbytes = traffic
    count = len(tokens)
    return Sample(tuple(tokens), measure(submitted_at, emitted_at, stats), messages / count, nbytes / count)
