"""The requests of a trace as a table: how long each one took, and what its guesses were worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeinfer.runtime.request_times import RequestTimes

MOST_SHOWN = 32
"""Requests that have a line; the others are counted only."""
COLUMNS = ("request", "prompt", "tokens", "ttft_ms", "tokens/s", "accepted", "drafted", "preempted", "end")


def table(requests: Sequence[RequestTimes]) -> Iterator[str]:
    """A heading, a line for each request in the order of submission, and their totals.

    ``ttft_ms``: from submission to the first token. ``tokens/s``: of a request after its first emission; of all
    together from the first submission to the last end. ``accepted``: drafted rows whose token was emitted."""
    if not requests:
        return
    yield _line(COLUMNS)
    for request in requests[:MOST_SHOWN]:
        yield _line(_row(request))
    if len(requests) > MOST_SHOWN:
        yield f"... and {len(requests) - MOST_SHOWN} more requests"
    yield _line(_totals(requests))


def _row(request: RequestTimes) -> list[str]:
    stats = request.stats
    return [
        str(request.number),
        str(len(request.request.prompt)),
        str(len(request.text)),
        _number(None if request.ttft_s is None else 1e3 * request.ttft_s),
        _number(request.tokens_per_s),
        "-" if stats is None else str(stats.accepted),
        "-" if stats is None else str(stats.drafted),
        str(request.preemptions),
        request.reason or "unfinished",
    ]


def _totals(requests: Sequence[RequestTimes]) -> list[str]:
    tokens = sum(len(one.text) for one in requests)
    took_s = max(one.ended_s for one in requests) - min(one.submitted_s for one in requests)
    waits = [one.ttft_s for one in requests if one.ttft_s is not None]
    stats = [one.stats for one in requests if one.stats is not None]
    unfinished = sum(not one.reason for one in requests)
    return [
        "all",
        str(sum(len(one.request.prompt) for one in requests)),
        str(tokens),
        _number(1e3 * sum(waits) / len(waits) if waits else None),
        _number(tokens / took_s if took_s > 0 else None),
        str(sum(one.accepted for one in stats)),
        str(sum(one.drafted for one in stats)),
        str(sum(one.preemptions for one in requests)),
        f"{unfinished} unfinished" if unfinished else f"{len(requests)} ended",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _line(values: Sequence[str]) -> str:
    return "  " + " ".join(f"{value:>9}" for value in values[:-1]) + f"  {values[-1]}"
