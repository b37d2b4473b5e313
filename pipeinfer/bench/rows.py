"""Rows: the results of one policy at one point, as JSON and as a line of a table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from pipeinfer.bench.sample import Sample
from pipeinfer.bench.suite import Point, Suite
from pipeinfer.core.metrics import percentile

MEDIANS = (
    "ttft_ms", "tpot_ms", "acceptance_rate", "accept_length",
    "tokens_per_correction", "waste", "bubble", "cancel_latency_ms",
)  # fmt: skip
OF_LOADS = ("goodput", "request_tpot_ms", "request_tpot_p99_ms", "ttft_p99_ms")
"""What rows of many requests have besides; p99 is that of all requests of a sample."""
AXES = (
    "hardware", "target", "draft", "ranks", "stages", "tp", "fused", "efficiency", "top1", "claims", "burst",
    "draft_time", "prompt_tokens", "tokens", "dtype", "set", "requests", "arrivals", "row_costs",
)  # fmt: skip
"""What tells points apart in a table."""
COLUMNS = {
    "tokens/s": "tokens_per_s.median", "p10": "tokens_per_s.p10", "p90": "tokens_per_s.p90", "ratio": "ratio_to_plain",
    "/ideal": "", "ttft_ms": "ttft_ms", "itl_p50": "itl_ms.p50", "acc_rate": "acceptance_rate",
    "acc_len": "accept_length", "waste": "waste", "bubble": "bubble",
    "tpot_p99": "request_tpot_p99_ms", "ttft_p99": "ttft_p99_ms",
}  # fmt: skip
BANNERS = {
    "real": "REAL: weights, ranks and clocks of this machine; more ranks than cores measure how they share them",
    "emulated": "EMULATED: real MPI ranks, messages and tokens; models are hash chains, stages and links are paced",
    "simulated": "SIMULATED: virtual time; neither Python nor MPI costs anything",
}


def make_row(
    suite: Suite, point: Point, name: str, samples: Sequence[Sample], facts: Mapping[str, Any], is_ours: bool = True
) -> dict[str, Any]:
    """The row of policy ``name``: medians over ``samples``, and the ``facts`` that are known of it anyway. Of a peer
    (not ``is_ours``) only times are known."""
    speeds = [sample.speed for sample in samples]
    metrics = [sample.metrics for sample in samples]
    medians: dict[str, Any] = {
        key: percentile([one[key] for one in metrics], 0.5) if is_ours or key.endswith("t_ms") else None
        for key in MEDIANS
    }
    medians["itl_ms"] = {
        share: percentile([one["itl_ms"][share] for one in metrics], 0.5) for share in ("p50", "p90", "p99")
    }
    return {
        "suite": suite.name,
        "policy": name,
        "execution": suite.execution,
        **facts,
        "tokens": point.tokens,
        "tokens_per_s": {
            "median": percentile(speeds, 0.5), "p10": percentile(speeds, 0.1), "p90": percentile(speeds, 0.9),
            "n": len(speeds),
        },
        "samples": speeds,
        "tokens_digest": _digest(samples),
        **medians,
        "calibration_error": metrics[-1]["calibration_error"] if is_ours else None,
        **{key: percentile([one[key] for one in metrics], 0.5) for key in OF_LOADS if key in metrics[0]},
        "messages_per_token": percentile([sample.messages for sample in samples], 0.5),
        "bytes_per_token": percentile([sample.nbytes for sample in samples], 0.5),
    }  # fmt: skip


def _digest(samples: Sequence[Sample]) -> str:
    """Tells whether two rows have the same tokens."""
    return hashlib.sha256(repr([sample.tokens for sample in samples]).encode()).hexdigest()[:16]


def of_ideal(row: Mapping[str, Any]) -> float | None:
    """The usual share of what ideal scheduling gives, each sample beside that of its own text."""
    if not row["ideal_tokens_per_s"]:
        return None
    ideals = row.get("ideal_samples") or [row["ideal_tokens_per_s"]] * len(row["samples"])
    return percentile([speed / ideal for speed, ideal in zip(row["samples"], ideals, strict=True)], 0.5)


def axes_of(points: Sequence[Point]) -> list[str]:
    """What differs among ``points``, or cannot be left out of a table."""
    varying = {knob.name for knob in fields(Point) if len({getattr(point, knob.name) for point in points}) > 1}
    return [axis for axis in AXES if axis in varying or axis in ("ranks", "stages")]


def heading(axes: Sequence[str]) -> str:
    """The line over a table."""
    return (
        "# "
        + " ".join([*(f"{axis:>{_width(axis)}}" for axis in axes), f"{'policy':<20}"])
        + "".join(f" {name:>9}" for name in COLUMNS)
    )


def line(row: Mapping[str, Any], axes: Sequence[str]) -> str:
    """``row`` as a line under that heading."""
    place = {**(row["acceptance"] or {}), **row}
    cells = [f"{_cell(place.get(axis)):>{_width(axis)}}" for axis in axes]
    numbers = "".join(f" {_number(row, path):>9}" for path in COLUMNS.values())
    return "  " + " ".join([*cells, f"{row['policy']:<20}"]) + numbers


def _width(axis: str) -> int:
    return {"hardware": 22, "target": 14, "draft": 14, "set": 24, "claims": 16}.get(axis, max(6, len(axis)))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    return "-" if value in (None, "") else str(value)


def _number(row: Mapping[str, Any], path: str) -> str:
    if not path:
        return "-" if (share := of_ideal(row)) is None else f"{share:.3f}"
    value: Any = row
    for key in path.split("."):
        value = value.get(key)
    return "-" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.0f}"
