"""`pipeinfer bench kernels`: what a row says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pipeinfer.bench import kernel_passes, kernels
from pipeinfer.bench.kernel_passes import PREFILL, beside
from pipeinfer.bench.kernels import (
    COLUMNS,
    Roofs,
    Sweep,
    heading,
    in_turn,
    line,
    linears_of,
    measure_linear,
    measure_quantized,
)
from pipeinfer.bench.low_bits import LAYOUTS
from pipeinfer.bench.shaped_pair import SPEC
from pipeinfer.core.errors import UserError
from stages.kernels.library import Library, library
from tests.models.test_shaped_pair import TINY

KEYS = {
    "shape", "format", "rows", "threads", "isa", "numerics", "activations", "gbs", "weights_per_ns", "of_read_roof",
    "of_arithmetic_roof", "ratio_torch", "ratio_llama_cpp",
}  # fmt: skip
ROOFS = Roofs(read=2e9, arithmetic=1e9)


needs_kernels = pytest.mark.skipif(library() is None, reason="the kernels are not built here")


def kernels_here() -> Library:
    found = library()
    assert found is not None
    return found


@needs_kernels
def test_a_row_follows_from_a_time() -> None:
    row = ROOFS.row(kernels_here(), "model", "bf16", 4, 1000, 2000, 1e-6)
    assert row.keys() >= KEYS
    assert (row["gbs"], row["of_read_roof"], row["of_arithmetic_roof"]) == pytest.approx((2.0, 1.0, 4.0))
    assert row["ratio_llama_cpp"] is None
    assert len(line(row)) == len(heading()) == 1 + sum(COLUMNS.values()) + len(COLUMNS)


@needs_kernels
@pytest.mark.parametrize("form", kernels.FORMATS)
def test_linears_in_every_format(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COLD_NBYTES", 100_000)
    monkeypatch.setattr(kernels, "SWEEP_S", 0.0)
    rows = list(measure_linear(kernels_here(), ROOFS, (48, 32), form, (1, 3)))
    assert [(row["shape"], row["format"], row["rows"]) for row in rows] == [("48x32", form, 1), ("48x32", form, 3)]
    for row in rows:
        assert row["ratio_torch"] == pytest.approx(row["torch_ms"] / row["ms"])
        json.dumps(row)


@needs_kernels
@pytest.mark.parametrize("form", LAYOUTS)
def test_linears_of_quantised_weights(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "COLD_NBYTES", 1000)
    monkeypatch.setattr(kernels, "SWEEP_S", 0.0)
    lib = kernels_here()
    rows = list(measure_quantized(lib, ROOFS, (48, 512), form, (1, 3)))
    kinds = ["fp32"] if LAYOUTS[form].kind != "integer" else ["fp32", "int8"]
    assert [(row["activations"], row["rows"]) for row in rows] == [(kind, count) for kind in kinds for count in (1, 3)]
    nbytes = rows[0]["gbs"] * rows[0]["ms"] * 1e6
    bits = LAYOUTS[form].bits
    assert bits <= 8 * nbytes / (48 * 512) <= bits + 0.9, "with scales"
    assert lib.activations == "fp32"


def test_the_linears_are_those_of_the_target() -> None:
    wanted = {(1536, 1536), (384, 1536), (4096, 1536), (1536, 4096), (16000, 1536)}
    assert linears_of(SPEC) == wanted


def test_a_sweep_goes_round() -> None:
    calls: list[int] = []
    sweep = Sweep([lambda index=index: calls.append(index) for index in range(3)])  # type: ignore[misc]
    assert calls == [0, 1]
    assert sweep() >= 0
    assert calls == [index % 3 for index in range(len(calls))] and len(calls) > 3


def test_contenders_take_turns_and_the_median_counts() -> None:
    left = {"a": iter([3.0, 1.0, 2.0]), "b": iter([5.0, 9.0, 7.0])}
    assert in_turn({name: times.__next__ for name, times in left.items()}, 3) == {"a": 2.0, "b": 7.0}


def test_a_prompt_is_compared_with_both_of_torchs_formats_and_llama_cpp_may_be_missing() -> None:
    found = {("ours", "bf16", PREFILL): 2.0, ("torch", "bf16", PREFILL): 10.0, ("torch", "fp32", PREFILL): 4.0}
    row = beside(found, "bf16", PREFILL)
    assert (row["ratio_torch"], row["ratio_torch_fp32"], row["ratio_torch_bf16"]) == (5.0, 2.0, 5.0)
    assert row["ratio_llama_cpp"] is None and row["torch_fp32_ms"] == 4000.0


def test_without_kernels_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "loaded", lambda: None)
    with pytest.raises(UserError, match="no kernels"):
        next(kernels.measure(1))


@needs_kernels
@pytest.mark.slow
def test_whole_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, Any] = {"SPEC": replace(TINY, layer_count=3), "ROUNDS": 1, "ROWS": (1, 4), "CONTEXT": 16}
    for name, value in small.items():
        monkeypatch.setattr(kernel_passes, name, value)
    rows = list(kernel_passes.measure_passes(kernels_here(), ROOFS))
    assert [row["rows"] for row in rows] == [1, 4, PREFILL] * (len(rows) // 3)
    assert {row["format"] for row in rows} >= {"fp32", "bf16"} and {row["shape"] for row in rows} == {"model"}
    assert all(row["ratio_torch"] > 0 and row["ms"] > 0 for row in rows)
