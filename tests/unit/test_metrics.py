"""The field's measures, computed by hand for a request one can follow."""

from __future__ import annotations

import pytest

from pipeinfer.core.metrics import measure, percentile, table
from pipeinfer.core.ports import RequestStats

EMISSIONS = [(10.5, 1), (10.6, 3), (10.9, 2)]
STATS = RequestStats(runs=9, cancelled_runs=2, rows=20, drafted=12, accepted=4, corrections=2, verifications=2)


def test_measures_of_a_small_request() -> None:
    found = measure(10.0, EMISSIONS, STATS)
    assert found["ttft_ms"] == pytest.approx(500)
    assert found["e2el_ms"] == pytest.approx(900)
    assert found["tpot_ms"] == pytest.approx(400 / 5)
    assert found["itl_ms"]["p50"] == pytest.approx(200)
    assert found["output_throughput"] == pytest.approx(6 / 0.9)
    assert found["acceptance_rate"] == pytest.approx(4 / 12)
    assert found["accept_length"] == pytest.approx(5 / 2)
    assert found["tokens_per_correction"] == pytest.approx(3)
    assert found["waste"] == pytest.approx(1 - 5 / 20)
    assert (found["runs"], found["cancelled_runs"]) == (9, 2)


def test_one_token_has_no_gaps() -> None:
    found = measure(0.0, [(0.25, 1)], RequestStats(corrections=1))
    assert (found["tpot_ms"], found["itl_ms"]["p99"], found["waste"], found["accept_length"]) == (0, 0, 0, 1)


def test_percentiles_interpolate() -> None:
    assert percentile([], 0.5) == 0
    assert percentile([3.0], 0.99) == 3
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == pytest.approx(2.5)
    assert percentile([1.0, 2.0], 1.0) == 2


def test_the_table_s_columns_line_up() -> None:
    names, values = table(measure(10.0, EMISSIONS, STATS)).split("\n")
    assert len(names) == len(values)
    assert names.split()[:2] == ["TTFT", "TPOT"]
