"""Measures of a server under load, as rows and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pipeinfer.bench.fingerprint import fingerprint
from pipeinfer.bench.serve_client import Outcome
from pipeinfer.bench.serve_load import Load
from pipeinfer.core.metrics import percentile

MOST_REASONS = 5
COLUMNS = {
    "clients": "concurrency", "rate": "rate", "done": "completed", "errors": "errors", "aborted": "aborted",
    "ttft_p50": "ttft_ms.p50", "ttft_p90": "ttft_ms.p90", "ttft_p99": "ttft_ms.p99",
    "tpot_p50": "tpot_ms.p50", "tpot_p90": "tpot_ms.p90", "tpot_p99": "tpot_ms.p99",
    "itl_p50": "itl_ms.p50", "itl_p90": "itl_ms.p90", "itl_p99": "itl_ms.p99",
    "tokens/s": "output_throughput", "req/s": "request_throughput", "goodput": "goodput",
}  # fmt: skip
"""Of the table: heading and place in a row."""


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request needs in order to count as good: milliseconds to the first token and per further token, or None
    for any."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None


def ttft_ms(outcome: Outcome) -> float:
    """From when the request was due to its first text; to its end, if it has none."""
    return 1e3 * ((outcome.first_at or outcome.ended_at) - outcome.due_at)


def tpot_ms(outcome: Outcome) -> float | None:
    """(time from the first text to the last) / (tokens - 1); None with fewer than two tokens."""
    return 1e3 * sum(outcome.gaps_s) / (outcome.new_tokens - 1) if outcome.new_tokens > 1 else None


def is_good(outcome: Outcome, objectives: Objectives) -> bool:
    """Whether a whole answer meets the ``objectives``."""
    each = tpot_ms(outcome)
    is_soon = objectives.ttft_ms is None or ttft_ms(outcome) <= objectives.ttft_ms
    return is_soon and (objectives.tpot_ms is None or each is None or each <= objectives.tpot_ms)


def measure(
    load: Load, outcomes: Sequence[Outcome], times: tuple[float, float], objectives: Objectives
) -> dict[str, Any]:
    """The row of a load. Times and tokens are those of whole answers; ITL: gaps between chunks with text, each of which
    may carry several tokens. goodput: requests per second that meet the objectives (DistServe)."""
    whole = [one for one in outcomes if one.is_whole]
    duration_s = max(times[1] - times[0], 1e-9)
    tokens = sum(one.new_tokens for one in whole)
    is_told = bool(whole) and all(one.tokens is not None for one in whole)
    good = sum(is_good(one, objectives) for one in whole)
    reasons = Counter(one.error for one in outcomes if one.error)
    return {
        "model": load.model, "endpoint": "chat" if load.is_chat else "completions",
        "concurrency": load.concurrency, "rate": load.rate or None, "seed": load.seed,
        "requests": len(outcomes), "distinct": load.distinct, "max_tokens": load.max_tokens,
        "completed": len(whole), "errors": reasons.total(), "aborted": sum(one.is_aborted for one in outcomes),
        "reasons": dict(reasons.most_common(MOST_REASONS)),
        "duration_s": duration_s,
        "input_tokens": sum(one.prompt_tokens or 0 for one in whole) if is_told else None,
        "output_tokens": tokens, "tokens_by": "usage" if is_told else "chunks",
        "output_throughput": tokens / duration_s, "request_throughput": len(whole) / duration_s,
        "ttft_ms": _shares([ttft_ms(one) for one in whole]),
        "tpot_ms": _shares([each for one in whole if (each := tpot_ms(one)) is not None]),
        "itl_ms": _shares([1e3 * gap for gap in chain.from_iterable(one.gaps_s for one in whole)]),
        "e2el_ms": _shares([1e3 * (one.ended_at - one.due_at) for one in whole]),
        "objectives": {"ttft_ms": objectives.ttft_ms, "tpot_ms": objectives.tpot_ms},
        "goodput": good / duration_s,
        "fingerprint": fingerprint({}, ""),
    }  # fmt: skip


def _shares(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"p50": None, "p90": None, "p99": None}
    return {f"p{share}": percentile(values, share / 100) for share in (50, 90, 99)}


def heading() -> str:
    """The line over the table; times in milliseconds."""
    return "# " + " ".join(f"{name:>9}" for name in COLUMNS)


def line(row: Mapping[str, Any]) -> str:
    """``row`` as a line under that heading."""
    return "  " + " ".join(f"{_shown(row, place):>9}" for place in COLUMNS.values())


def _shown(row: Mapping[str, Any], place: str) -> str:
    value: Any = row
    for key in place.split("."):
        value = value[key]
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}" if value < 1000 else f"{value:.0f}"
