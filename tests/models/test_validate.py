"""The comparison of the cost model with real passes, on models so small that it is quick."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeinfer.bench import validate
from pipeinfer.bench.passes import one_pass, random_model, whole_shard
from pipeinfer.bench.validate import Comparison, compare, table
from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.costs.hardware import Arithmetic, read_hardware
from pipeinfer.costs.roofline import ModelCosts
from pipeinfer.costs.shapes import of_spec

SMALL = random_model(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocab=64)


def test_every_point_of_both_models_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "LARGE", {"random": SMALL})
    monkeypatch.setattr(validate, "ROUNDS", 2)
    arithmetic = {"bf16": Arithmetic(peak=1e11, overhead_s=1e-4)}
    hardware = replace(read_hardware("dual-xeon-e5-1gbe"), cores=torch.get_num_threads(), arithmetic=arithmetic)
    found = compare(hardware, model_directory(BUILTIN, "target"))
    points = [(rows, context) for context in validate.CONTEXTS for rows in validate.ROWS]
    assert [(one.model, one.rows, one.context) for one in found] == [
        (model, *point) for model in ("target", "random") for point in points
    ]
    assert all(len(one.taken_s) == 2 and one.best_s > 0 for one in found)
    costs = ModelCosts(hardware, of_spec(SMALL, "random").held_in("bf16"))
    assert found[-1].predicted_s == costs.pass_s(16, 1024)


def test_the_table_tells_the_errors() -> None:
    early, late = (Comparison("m", "fp32", rows, 64, predicted_s=1e-3) for rows in (1, 2))
    early.taken_s += [2e-3, 0.5e-3, 1e-3]
    late.taken_s += [0.8e-3, 0.8e-3, 0.5e-3]
    head, *rows, median, best = table([early, late])
    assert head.split()[-5:] == ["predicted_ms", "median_ms", "error_%", "best_ms", "error_%"]
    assert [row.split() for row in rows] == [
        ["m", "fp32", "1", "64", "1.00", "1.00", "0.00", "0.50", "100.00"],
        ["m", "fp32", "2", "64", "1.00", "0.80", "25.00", "0.50", "100.00"],
    ]
    assert median == "# against the median time: median error 12 %, worst 25 % (m, fp32, 2 rows)"
    assert best == "# against the best time: median error 100 %, worst 100 % (m, fp32, 2 rows)"


def test_a_pass_computes_all_its_rows() -> None:
    choices = one_pass(whole_shard(SMALL, "fp32", 16), rows=3, context=16)()
    assert isinstance(choices, list)
    assert [len(row) for row in choices] == [1, 1, 1]
