"""The cost model, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeinfer.core.errors import UserError
from pipeinfer.core.links import Link
from pipeinfer.costs.hardware import Arithmetic, Curve, Hardware, read_hardware
from pipeinfer.costs.roofline import Costs, ModelCosts
from pipeinfer.costs.shapes import Shape, read_shape

# A layer of 1000 * (2 * 100 * 12 + 3 * 2000) = 8.4e6 weights, 33.6 MB; a slot of it is 2 * 2 * 100 * 4 = 1600 bytes.
SHAPE = Shape(
    "model", layers=4, hidden=1000, heads=10, kv_heads=2, head_dim=100, intermediate=2000, vocab=5000, gated=True,
    tied=False, weight_bits=32.0, dtype="fp32", slot_bits=32.0,
)  # fmt: skip
ROOFLINE = Arithmetic(peak=33.6e9, overhead_s=1e-3)
HARDWARE = Hardware("host", "a host", 1, 10**9, 16.8e9, Link(1e-3, bandwidth=1e6), {"fp32": ROOFLINE})


def with_(**changes: object) -> Hardware:
    return replace(HARDWARE, arithmetic={"fp32": replace(ROOFLINE, **changes)})


def test_few_rows_wait_for_memory_and_many_for_arithmetic() -> None:
    costs = Costs(HARDWARE, SHAPE)
    # Reading 33.6 MB takes 2 ms. A row's 16.8 MFLOP take 0.5 ms, so up to four of them are free.
    assert [costs.layer_s(rows, 0) for rows in (1, 4, 8)] == pytest.approx([3e-3, 3e-3, 5e-3])


def test_attention_comes_on_top() -> None:
    costs = Costs(HARDWARE, SHAPE)
    # 2100 slots are 3.36 MB, 0.2 ms. A row's 4 * 2100 * 10 * 100 = 8.4 MFLOP take 0.25 ms: more, even for one row.
    assert costs.layer_s(1, 2100) - costs.layer_s(1, 0) == pytest.approx(0.25e-3)
    assert costs.layer_s(4, 2100) - costs.layer_s(4, 0) == pytest.approx(1e-3)
    fast = Costs(replace(HARDWARE, arithmetic={"fp32": replace(ROOFLINE, peak=1e15)}), SHAPE)
    assert fast.layer_s(4, 2100) - fast.layer_s(4, 0) == pytest.approx(0.2e-3)


def test_the_head_and_a_pass_of_the_draft() -> None:
    draft = replace(SHAPE, name="draft", layers=2)
    costs = Costs(HARDWARE, SHAPE, draft)
    assert costs.head_s(1) == pytest.approx(5e6 * 4 / 16.8e9 + 1e-3)
    assert costs.draft_s(8, 2100) == pytest.approx(2 * costs.layer_s(8, 2100) + costs.head_s(8))
    with pytest.raises(UserError, match="a draft pass without a draft; name a draft model"):
        Costs(HARDWARE, SHAPE).draft_s(1, 1)


def test_a_pass_that_reads_weights_from_a_disk_costs_the_same_for_few_rows_and_many() -> None:
    costs = ModelCosts(replace(HARDWARE, disk=1e9), SHAPE)
    assert costs.streamed_s(1, 0, 1e8) == costs.streamed_s(32, 0, 1e8) == pytest.approx(0.1)
    assert costs.streamed_s(64, 0, 1e8) == costs.pass_s(64, 0) > 0.1, "until arithmetic takes longer"
    with pytest.raises(UserError, match="nothing of a disk"):
        ModelCosts(HARDWARE, SHAPE).streamed_s(1, 0, 1e8)


def test_quantised_weights_are_read_faster_and_computed_alike() -> None:
    curve = Curve((1, 4), (8e9, 4e9))
    known = ModelCosts(replace(HARDWARE, weights={"q4_k": curve}), replace(SHAPE, weight_bits=4.5, format="q4_k"))
    nbytes = SHAPE.head_numel * 4.5 / 8
    assert known.head_s(4) == pytest.approx(nbytes / 4e9 + ROOFLINE.overhead_s)
    quantised = Costs(HARDWARE, replace(SHAPE, weight_bits=4.0))
    assert quantised.layer_s(1, 0) == pytest.approx(0.5e-3 + 1e-3), "a row's arithmetic is longer than 0.25 ms"
    assert quantised.layer_s(8, 0) == Costs(HARDWARE, SHAPE).layer_s(8, 0)


def test_a_measured_curve_takes_the_rooflines_place() -> None:
    costs = Costs(with_(linear=Curve((1, 2, 4), (33.6e9, 8.4e9, 8.4e9))), SHAPE)
    assert [costs.layer_s(rows, 0) for rows in (1, 2, 3, 4)] == pytest.approx([2e-3, 5e-3, 5e-3, 5e-3])
    quantised = replace(SHAPE, weight_bits=4.0)
    assert Costs(with_(linear=Curve((1,), (1.0,))), quantised).layer_s(1, 0) < 1, "it was measured with whole weights"


def test_attention_is_measured_by_rows_times_heads_that_share_a_key_head() -> None:
    costs = Costs(with_(attention=Curve((1, 5, 10), (16e9, 8e9, 4e9))), SHAPE)
    extra = [costs.layer_s(rows, 1000) - costs.layer_s(rows, 0) for rows in (1, 2, 4)]
    assert extra == pytest.approx([1.6e6 / 8e9, 1.6e6 / 4e9, 1.6e6 / 2e9])


def test_bytes_by_hand() -> None:
    costs = Costs(HARDWARE, SHAPE)
    assert costs.activation_nbytes(3) == 3 * 1000 * 4
    assert costs.slots_nbytes(2, 50) == 2 * 50 * 1600
    assert costs.stage_nbytes(2, 50) == 2 * 33_600_000 + 160_000
    assert costs.stage_nbytes(2, 50, ends=1) == 2 * 33_600_000 + 160_000 + 20_000_000


def test_a_dtype_that_the_hardware_does_not_know_is_refused() -> None:
    with pytest.raises(UserError, match=r"hardware host says nothing of bf16, in which model computes; .*fp32"):
        ModelCosts(HARDWARE, SHAPE.held_in("bf16"))


def test_a_70b_layer_on_old_xeons() -> None:
    """855.6 million weights at 3.85 bits are 412 MB: 5.5 ms at 75 GB/s. Two rows hide behind that, eight do not."""
    costs = Costs(read_hardware("dual-xeon-e5-1gbe"), read_shape("llama-2-70b"), read_shape("tinyllama-1.1b"))
    assert costs.layer_s(1, 128) == pytest.approx(5.5e-3, rel=0.02)
    assert costs.layer_s(2, 128) / costs.layer_s(1, 128) < 1.01
    assert costs.layer_s(8, 128) == pytest.approx(8 * 2 * 855.6e6 / 921.6e9, rel=0.02)
    assert costs.activation_nbytes(1) == 32768
