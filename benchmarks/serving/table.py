"""Rows of the comparison: what each contender reached over the rounds, and the ratio to the better of llama.cpp's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.client import Sample
from benchmarks.serving.servers import Contender
from pipeinfer.core.metrics import percentile

COLUMNS = {
    "clients": "clients", "server": "server", "tokens/s": "tokens_per_s", "least": "least", "most": "most",
    "ttft_p50": "ttft_ms.p50", "ttft_p99": "ttft_ms.p99", "tpot_p50": "tpot_ms.p50", "tpot_p99": "tpot_ms.p99",
    "x tokens/s": "ratio.tokens_per_s", "x least": "ratio.least", "x most": "ratio.most",
    "x ttft": "ratio.ttft", "x tpot": "ratio.tpot", "equal": "equal",
}  # fmt: skip
"""Of the table: heading and place in a row."""


@dataclass(frozen=True, slots=True)
class Found:
    """The ``samples`` of a contender at a number of clients, one for each round."""

    contender: Contender
    samples: Sequence[Sample]

    @property
    def tokens_per_s(self) -> float:
        """The median of the rounds."""
        return statistics.median(one.tokens_per_s for one in self.samples)

    def ttft_ms(self, share: float) -> float:
        """Of all requests of all rounds."""
        return percentile([each for one in self.samples for each in one.ttft_ms], share)

    def tpot_ms(self, share: float) -> float:
        """Of all requests of all rounds."""
        return percentile([each for one in self.samples for each in one.tpot_ms], share)


def rows(clients: int, found: Sequence[Found]) -> list[dict[str, Any]]:
    """A row for each contender. Its ratios are to the contender of llama.cpp with the most tokens per second; above 1
    it is better than that one. ``equal``: texts of the first round that equal those of the first contender of ours."""
    theirs = [one for one in found if not one.contender.is_ours]
    ours = next((one for one in found if one.contender.is_ours), None)
    best = max(theirs, key=lambda one: one.tokens_per_s, default=None)
    return [_row(clients, one, best, ours) for one in found]


def _row(clients: int, one: Found, best: Found | None, ours: Found | None) -> dict[str, Any]:
    speeds = [sample.tokens_per_s for sample in one.samples]
    return {
        "clients": clients, "server": one.contender.name, "best": one is best,
        "requests": len(one.samples[0].texts), "input_tokens": one.samples[0].input_tokens,
        "tokens_per_s": one.tokens_per_s, "least": min(speeds), "most": max(speeds), "samples": speeds,
        "ttft_ms": {"p50": one.ttft_ms(0.5), "p99": one.ttft_ms(0.99)},
        "tpot_ms": {"p50": one.tpot_ms(0.5), "p99": one.tpot_ms(0.99)},
        "ratio": None if best is None else ratio(one, best),
        "equal": None if ours is None else equal_texts(one.samples[0], ours.samples[0]),
    }  # fmt: skip


def ratio(one: Found, best: Found) -> dict[str, float]:
    """Of ``one`` to ``best``, of the medians; ``least`` and ``most``: of the tokens per second of a round. Times are
    the other way round, so that above 1 is always better."""
    pairs = zip(one.samples, best.samples, strict=True)
    each = [mine.tokens_per_s / other.tokens_per_s for mine, other in pairs]
    return {
        "tokens_per_s": one.tokens_per_s / best.tokens_per_s, "least": min(each), "most": max(each),
        "ttft": best.ttft_ms(0.5) / one.ttft_ms(0.5), "tpot": best.tpot_ms(0.5) / one.tpot_ms(0.5),
    }  # fmt: skip


def equal_texts(one: Sample, other: Sample) -> int:
    """Requests with the same text in both."""
    return sum(mine == text for mine, text in zip(one.texts, other.texts, strict=True))


def remarks(found: Sequence[Found]) -> list[str]:
    """What must not be: prompts that are other tokens to another server, and answers of ours that differ."""
    told = []
    counts = {one.contender.name: one.samples[0].input_tokens for one in found}
    if len(set(counts.values())) > 1:
        told.append(f"the prompts are not the same tokens to all servers: {counts}")
    ours = [(one.contender.name, sample) for one in found if one.contender.is_ours for sample in one.samples]
    for name, sample in ours[1:]:
        if equal := len(sample.texts) - equal_texts(sample, ours[0][1]):
            told.append(f"{name} has {equal} texts that are not those of {ours[0][0]}")
    return told


def heading() -> str:
    """The line over the table; times in milliseconds."""
    return "# " + " ".join(f"{name:>{_width(name)}}" for name in COLUMNS)


def line(row: Mapping[str, Any]) -> str:
    """``row`` under that heading; the best of llama.cpp's has a star."""
    return ("* " if row["best"] else "  ") + " ".join(
        f"{_shown(row, place):>{_width(name)}}" for name, place in COLUMNS.items()
    )


def _width(name: str) -> int:
    return max(13 if name == "server" else 8, len(name))


def _shown(row: Mapping[str, Any], place: str) -> str:
    value: Any = row
    for key in place.split("."):
        value = None if value is None else value[key]
    if value is None:
        return "-"
    if place == "equal":
        return f"{value}/{row['requests']}"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
