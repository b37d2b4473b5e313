"""Rounded matrices: every code is the nearest, scales are no worse than the largest weight's, and nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.quantization.bit_fields import bytes_of, codes_of
from stages.quantization.matrix import floats_of
from stages.quantization.packing import stored_shapes, stored_tensors
from stages.quantization.rounding import FORMATS, PLANE, quantize_matrix
from tests.models.stored_numbers import E3M2

NUMBERS = {"int8": np.arange(-128, 128), "int4": np.arange(-8, 8), "fp6": E3M2}
CASES = [
    ("int8", 0, (5, 33), torch.bfloat16),
    ("int8", 32, (7, 96), torch.float16),
    ("int4", 128, (3, 256), torch.bfloat16),
    ("int4", 32, (9, 64), torch.float32),
    ("int4", 0, (2, 7), torch.float32),
    ("fp6", 0, (6, 35), torch.bfloat16),
    ("fp6", 64, (4, 128), torch.float32),
]


def weights(shape: tuple[int, int], dtype: torch.dtype, seed: int = 3) -> torch.Tensor:
    """Usual weights, with an output of zeros, one of equal weights, and a large weight in one."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    matrix[0] = 0
    matrix[1] = 0.25
    matrix[-1, -1] = 3
    return matrix.to(dtype)


@pytest.mark.parametrize(("format", "group", "shape", "dtype"), CASES)
def test_codes_are_the_nearest(format: str, group: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weights(shape, dtype)
    found = quantize_matrix(weight, format, group)
    assert (found.shape, found.bits, found.scales.dtype) == (shape, FORMATS[format].bits, dtype)
    assert int(found.codes.max()) < 2**found.bits and (found.scales > 0).all() and found.scales.isfinite().all()
    scales = found.scales.float().repeat_interleave(group or shape[1], 1).numpy()
    numbers = scales[..., None] * NUMBERS[format].astype(np.float32)
    error = np.abs(found.dense().numpy() - weight.float().numpy())
    assert (error <= np.abs(numbers - weight.float().numpy()[..., None]).min(-1) + 1e-9).all()
    assert not found.dense()[0].any()


@pytest.mark.parametrize(("format", "group", "shape", "dtype"), CASES)
def test_a_search_is_no_worse_than_the_first_scale(
    format: str, group: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = weights(shape, dtype)
    importance = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) ** 4

    blocks = weight.float().view(shape[0], -1, group or shape[1])

    def error(numbers: torch.Tensor) -> torch.Tensor:
        off = numbers.view_as(blocks) - blocks
        return (off.square() * importance.view(blocks.shape[1:])).sum(-1)

    rounding = FORMATS[format]
    scales = (blocks.abs().amax(2, keepdim=True) / rounding.top).to(dtype).float()
    first = error(torch.nan_to_num(rounding.nearest(blocks / scales)) * scales)
    best, usual = (error(quantize_matrix(weight, format, group, weighed).dense()) for weighed in (importance, None))
    assert (best <= first * (1 + 1e-5) + 1e-12).all() and (best.sum() < first.sum())
    assert best.sum() <= usual.sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("format", FORMATS)
def test_tiny_and_huge_weights_are_stored(format: str, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    weight = torch.tensor([[limits.max / 4, -limits.max / 12] * 16, [limits.tiny, -limits.tiny / 2] * 16]).to(dtype)
    found = quantize_matrix(weight, format).dense()
    assert found.isfinite().all()
    assert (found[0] - weight[0].float()).abs().max() <= 0.03 * limits.max


def test_the_plane_is_that_of_fp6() -> None:
    weight = weights((8, 96), torch.bfloat16)
    whole, plane = quantize_matrix(weight, "fp6", 32), quantize_matrix(weight, PLANE, 32)
    assert torch.equal(plane.codes, whole.codes >> 2) and plane.bits == 4
    powers = torch.where(floats_of("e3m2")[whole.codes.int() & ~3].abs() < 0.25, 0, whole.codes.int() & ~3)
    scales = plane.scales.float().repeat_interleave(32, 1)
    assert torch.equal(plane.dense(), floats_of("e3m2")[powers] * scales)
    error = (plane.dense()[2:] - weight[2:].float()).norm() / weight[2:].float().norm()
    assert error < 0.3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.ones(4, 32)
    weight[2, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        quantize_matrix(weight, "int4")


@pytest.mark.parametrize("group", [48, 64, 16])
def test_groups_that_do_not_fit_are_refused(group: int) -> None:
    with pytest.raises(ValueError, match=f"groups of {group} do not divide 96"):
        quantize_matrix(torch.ones(4, 96), "int8", group)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 32, 35])
def test_packing_is_undone(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (3, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    for word in (8, 32):
        packed = bytes_of(codes, bits, word)
        assert packed.shape[1] * 8 % word == 0 and packed.shape[1] * 8 < count * bits + word
        assert torch.equal(codes_of(packed, bits, count), codes)


@pytest.mark.parametrize(("format", "group", "shape", "dtype"), CASES)
def test_stored_tensors_have_the_shapes_that_were_told(
    format: str, group: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    spellings = {torch.int32: "I32", torch.uint8: "U8", dtype: ""}
    stored = stored_tensors(quantize_matrix(weights(shape, dtype), format, group))
    told = {name: (spellings[tensor.dtype], tuple(tensor.shape)) for name, tensor in stored.items()}
    assert told == stored_shapes(*shape, format, group)
