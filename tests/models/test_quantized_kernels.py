"""Quantised weights on the kernels: the numbers of ``dense``, and the same bits in any company and instruction set."""

from __future__ import annotations

import ctypes
import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stages.kernels.cuts import are_aligned, even_cuts, part_of
from stages.kernels.library import Library, library
from stages.kernels.linear import Linear
from stages.models.split import down_cuts, output_cuts
from stages.quantization.matrix import QuantizedMatrix
from tests.models.grouped import check_groups
from tests.models.kernel_bits import check_world, draw_spec, same_as
from tests.models.quantized_matrices import FORMATS
from tests.models.quantized_worlds import PLAIN, draw_quantized_world

SOUND = library()
pytestmark = pytest.mark.skipif(SOUND is None, reason="there is no library of kernels")
SHAPES = ((48, 64), (17, 257), (130, 1000), (33, 31), (1, 1), (200, 520))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def lib() -> Iterator[Library]:
    found = library()  # which another test may have opened anew
    assert found is not None
    before = found.isa, found.threads, found.activations
    found.set_threads(1)
    yield found
    found.use(before[0])
    found.set_threads(before[1])
    found.activations = before[2]


def drawn(name: str, outputs: int, inputs: int) -> tuple[QuantizedMatrix, Tensor]:
    """A matrix of the format, and 45 rows for it."""
    generator = torch.Generator().manual_seed(1000 * outputs + inputs)
    return FORMATS[name](generator, outputs, inputs), torch.randn(45, inputs, generator=generator)


def as_bytes(x: Tensor) -> Tensor:
    """What 8-bit activations make of ``x``, in float64."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[1] % 32)).view(len(x), -1, 32)
    most = blocks.abs().amax(-1, keepdim=True)
    rounded = (blocks * (127 / most)).round()
    return (rounded.double() * (most / 127).double()).view(len(x), -1)[:, : x.shape[1]]


@pytest.mark.parametrize("activations", ["fp32", "int8"])
@pytest.mark.parametrize("name", FORMATS)
def test_sums_are_those_of_dense_numbers_in_any_company(name: str, activations: str, lib: Library) -> None:
    lib.activations, dice = activations, random.Random(name + activations)
    for outputs, inputs in dice.sample(SHAPES, 3):
        matrix, x = drawn(name, outputs, inputs)
        layer = Linear.pack(matrix)
        assert layer.packing is not None and layer.c.is_integer == (activations == "int8" and matrix.kind == "integer")
        lib.use(lib.available[0])
        lib.set_threads(1)
        truth = torch.cat([layer(row[None]) for row in x])
        dense, given = matrix.dense().double(), as_bytes(x) if layer.c.is_integer else x.double()
        sizes = x.double().abs() @ dense.abs().T
        # Of numbers that are small beside their minima much is lost; those of a block are as large as x and its scale.
        minima = 0.0 if matrix.minima is None else 2e-6 * x.abs().sum(1, keepdim=True) * dense.abs().max()
        assert ((truth - given @ dense.T).abs() <= 1e-6 * sizes + minima).all(), (outputs, inputs)
        for isa in same_as(lib.available[0], lib):
            lib.use(isa)
            lib.set_threads(dice.choice((1, 2, 3)))
            for count in (1, 2, 7, 45):
                rows = dice.sample(range(45), count)
                assert torch.equal(layer(x[rows]), truth[rows]), (outputs, inputs, isa, lib.threads, rows)


def test_the_portable_kernels_compute_the_same_but_for_rounding(lib: Library) -> None:
    for name in FORMATS:
        matrix, x = drawn(name, 33, 257)
        for lib.activations in ("fp32", "int8"):
            layer = Linear.pack(matrix)
            lib.use(lib.available[0])
            truth = layer(x[:3])
            lib.use("portable")
            assert torch.allclose(layer(x[:3]), truth, rtol=1e-4, atol=1e-4 * float(truth.abs().max())), name


def test_nothing_beyond_a_row_is_read(lib: Library) -> None:
    """What is not a number there would show."""
    for lib.activations in ("fp32", "int8"):
        for inputs in (31, 40, 257):
            matrix, x = drawn("q4_k", 20, inputs)
            layer, wide = Linear.pack(matrix), torch.full((45, inputs + 9), torch.nan)
            wide[:, :inputs] = x
            found = torch.empty((45, 32))
            given = wide.data_ptr(), wide.shape[1], 45, found.data_ptr(), 32
            lib.kernels.linear(ctypes.addressof(layer.c), *given)
            assert torch.equal(found[:, :20], layer(x)), (inputs, lib.activations)


def test_what_is_not_finite_shows_in_its_row_alone(lib: Library) -> None:
    matrix, x = drawn("q8_0", 20, 100)
    lib.activations = "int8"
    layer, truth = Linear.pack(matrix), Linear.pack(matrix)(x[:4])
    for bad in (torch.nan, torch.inf, -torch.inf):
        given = x[:4].clone()
        given[2, 77] = bad
        found = layer(given)
        assert not found[2].isfinite().any() and torch.equal(found[[0, 1, 3]], truth[[0, 1, 3]])
    assert not layer(torch.zeros(2, 100)).any()


@pytest.mark.parametrize("name", FORMATS)
def test_an_embedding_has_the_numbers_of_dense(name: str, lib: Library) -> None:
    matrix, _ = drawn(name, 40, 200)
    layer, tokens, found = Linear.pack(matrix), torch.arange(40), torch.empty((40, 200))
    for isa in lib.available:
        lib.use(isa)
        lib.kernels.embed(ctypes.addressof(layer.c), tokens.data_ptr(), 40, found.data_ptr())
        assert torch.equal(found, matrix.dense()), isa


def test_a_layer_of_several_formats_keeps_them(lib: Library) -> None:
    for lib.activations in ("fp32", "int8"):
        made = [drawn(name, outputs, 512) for name, outputs in (("q4_k", 64), ("q4_k", 32), ("q6_k", 32))]
        weights, x = [matrix for matrix, _ in made], made[0][1]
        biases = [torch.randn(len(matrix.codes)) for matrix in weights]
        plain = torch.randn(40, 512).bfloat16()
        for given in (weights, [*weights, plain], [plain[:32], *weights]):
            more = [*biases, *[torch.randn(len(weight)) for weight in given if isinstance(weight, Tensor)]]
            sizes = [weight.shape[0] for weight in given]
            more = [torch.cat(more)[:size] for size in sizes]
            layer, cuts = Linear.joined(given, more), even_cuts(512, 32)
            assert layer.nbytes < sum(sizes) * 512 * 2
            apart = [Linear.pack(weight, bias, cuts)(x) for weight, bias in zip(given, more, strict=True)]
            for threads in (1, 2):
                lib.set_threads(threads)
                assert torch.equal(layer(x), torch.cat(apart, 1))
                assert torch.equal(layer(x[7:8]), torch.cat(apart, 1)[7:8])


def test_formats_that_kernels_do_not_have_become_floats(lib: Library) -> None:
    matrix, x = drawn("int4_zeros_16", 32, 64)
    fine = replace(
        matrix,
        group=8,
        span=8,
        scales=matrix.scales.repeat_interleave(2, 1),
        zeros=matrix.zeros.repeat_interleave(2, 1),  # type: ignore[union-attr]
    )
    layer = Linear.pack(fine)
    assert layer.packing is None and torch.equal(fine.dense(), matrix.dense())
    assert torch.allclose(layer(x), Linear.pack(matrix)(x), atol=1e-4)
    assert Linear.pack(matrix, None, [0, 8, 16, 24, 32, 40, 48, 56, 64]).packing is None, "cuts within blocks"


def test_parts_of_a_matrix_add_up(lib: Library) -> None:
    """A cut within a group makes groups smaller; the chains are the same."""
    for name in ("int4_128", "q6_k", "fp6", "int8_rows"):
        for lib.activations in ("fp32", "int8"):
            matrix, x = drawn(name, 40, 520)
            cuts = even_cuts(520, 32)
            whole = Linear.pack(matrix, None, cuts)(x)
            for size in (2, 4, 8):
                parts = [part_of(cuts, rank, size) for rank in range(size)]
                sums = [Linear.pack(matrix[:, p.start : p.stop], None, own)(x[:, p.start : p.stop]) for p, own in parts]
                while len(sums) > 1:
                    sums = [sums[i] + sums[i + 1] for i in range(0, len(sums), 2)]
                assert torch.equal(sums[0], whole), (name, size)


def test_cuts_lie_between_blocks_where_there_are_enough() -> None:
    for seed in range(300):
        spec = draw_spec(random.Random(seed))
        assert are_aligned(down_cuts(spec)) or spec.intermediate_size < 256
        inputs = spec.head_count * spec.head_dim
        assert are_aligned(output_cuts(spec)) or inputs < 8 * math.lcm(spec.head_dim, 32)
        assert all(cut % spec.head_dim == 0 for cut in output_cuts(spec)) or spec.head_count < 8


@pytest.mark.parametrize("seed", range(8))
def test_worlds_with_quantised_weights(seed: int) -> None:
    """More of them: python -m tests.models.quantized_worlds."""
    check_world(seed, 3, draw=draw_quantized_world)


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_groups_with_quantised_weights(seed: int) -> None:
    assert SOUND is not None
    check_groups(seed, SOUND, 1, (2, 4), world=draw_quantized_world(seed))


def test_the_random_worlds_have_what_they_should() -> None:
    worlds = [draw_quantized_world(seed) for seed in range(100)]
    assert {form for world in worlds for form in world.weights.formats.values()} == {*FORMATS, PLAIN}  # type: ignore[attr-defined]
    assert {world.arithmetic for world in worlds} == {"fp32", "int8"}
    assert any(world.spec.experts for world in worlds)
