"""Measures of one request, under the field's names. Times in milliseconds, taken on one monotonic clock."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pipeinfer.core.ports import RequestStats


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` (0 to 1) of ``values`` do not exceed, interpolated linearly; 0 for no values."""
    if not values:
        return 0.0
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def measure(submitted_at: float, emitted_at: Sequence[tuple[float, int]], stats: RequestStats) -> dict[str, Any]:
    """TTFT: request to first token. TPOT: (E2EL - TTFT) / (tokens - 1). ITL: gaps between *emissions*, each of which
    may carry several tokens. E2EL: request to last token. ``emitted_at``: (time in seconds, tokens) of each emission.

    acceptance_rate: accepted drafted tokens / drafted tokens sent to the target, each counted once. accept_length: the
    mean acceptance length (tau): tokens after the first per verification pass that carried the root, which is 1 without
    speculation. tokens_per_correction: a correction is an emitted token that no row in flight held.
    waste: rows sent after prefill that no emitted token needed / rows sent after prefill. bubble: the share of the time
    after the first token in which a stage did not work, the mean of all. cancel_latency_ms: from the cancel of a run
    to its return as a tombstone, on average. calibration_error: expected calibration error (Guo et al. 2017) of
    the guesses' probabilities as the drafts claimed them and as they were believed, over all requests.
    """
    tokens = sum(count for _, count in emitted_at)
    first, last = emitted_at[0][0], emitted_at[-1][0]
    gaps = [1e3 * (later[0] - earlier[0]) for earlier, later in pairwise(emitted_at)]
    ttft_ms, e2el_ms = 1e3 * (first - submitted_at), 1e3 * (last - submitted_at)
    needed = min(tokens - 1, stats.rows)  # every emitted token but the prompt's own successor needs one row
    return {
        "ttft_ms": ttft_ms,
        "tpot_ms": (e2el_ms - ttft_ms) / max(1, tokens - 1),
        "e2el_ms": e2el_ms,
        "itl_ms": {f"p{share}": percentile(gaps, share / 100) for share in (50, 90, 99)},
        "output_throughput": 1e3 * tokens / e2el_ms if e2el_ms else 0.0,
        "acceptance_rate": stats.accepted / stats.drafted if stats.drafted else 0.0,
        "accept_length": (tokens - 1) / stats.verifications if stats.verifications else 1.0,
        "tokens_per_correction": tokens / stats.corrections if stats.corrections else float(tokens),
        "runs": stats.runs,
        "cancelled_runs": stats.cancelled_runs,
        "bubble": max(0.0, 1.0 - 1e3 * stats.busy_s / (e2el_ms - ttft_ms)) if last > first else 0.0,
        "waste": 1.0 - needed / stats.rows if stats.rows else 0.0,
        "cancel_latency_ms": 1e3 * stats.cancel_s / stats.tombstones if stats.tombstones else 0.0,
        "calibration_error": {
            "claimed": stats.claimed_error,
            "believed": stats.believed_error,
            "outcomes": stats.verified_guesses,
        },
    }


def table(metrics: dict[str, Any]) -> str:
    """The measures as people read them, two aligned lines."""
    itl = metrics["itl_ms"]
    slots = [
        ("TTFT", f"{metrics['ttft_ms']:.1f} ms"),
        ("TPOT", f"{metrics['tpot_ms']:.2f} ms"),
        ("ITL p50/p90/p99", f"{itl['p50']:.1f}/{itl['p90']:.1f}/{itl['p99']:.1f} ms"),
        ("tokens/s", f"{metrics['output_throughput']:.1f}"),
        ("acceptance_rate", f"{metrics['acceptance_rate']:.2f}"),
        ("accept_length", f"{metrics['accept_length']:.2f}"),
        ("runs", str(metrics["runs"])),
        ("cancelled", str(metrics["cancelled_runs"])),
        ("waste", f"{metrics['waste']:.2f}"),
    ]
    widths = [max(len(name), len(value)) for name, value in slots]
    names = "  ".join(name.rjust(width) for (name, _), width in zip(slots, widths, strict=True))
    values = "  ".join(value.rjust(width) for (_, value), width in zip(slots, widths, strict=True))
    return f"{names}\n{values}"
