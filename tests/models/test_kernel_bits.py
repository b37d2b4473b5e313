"""A row has the same bits alone and in any company: a part of the random cases of kernel_bits, and linear layers alone.

The faults that must be noticed are in test_kernel_mutants.py."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stages.kernels.cuts import even_cuts
from stages.kernels.library import Library, library
from stages.kernels.linear import Linear
from tests.models.kernel_bits import DTYPES, check_world, draw_world, same_as

pytestmark = pytest.mark.skipif(library() is None, reason="there is no library of kernels")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def lib() -> Iterator[Library]:
    found = library()
    assert found is not None
    isa, threads = found.isa, found.threads
    yield found
    found.use(isa)
    found.set_threads(threads)


@pytest.mark.parametrize("seeds", [range(part, 28, 4) for part in range(4)], ids=lambda seeds: f"from {seeds.start}")
def test_a_row_in_any_company_has_the_bits_that_it_has_alone(seeds: range) -> None:
    for seed in seeds:
        check_world(seed, cases=6)


def test_the_random_worlds_have_what_they_should() -> None:
    worlds = [draw_world(seed) for seed in range(200)]
    specs = [world.spec for world in worlds]
    assert {world.dtype for world in worlds} == set(DTYPES)
    assert {896, 1536, 65} < {spec.hidden_size for spec in specs} and 4864 in {spec.intermediate_size for spec in specs}
    assert {6, 64, 80, 96} < {spec.head_dim for spec in specs}
    assert any(spec.head_count > spec.kv_head_count > 1 for spec in specs)
    for name in ("tied", "qkv_bias", "output_bias", "mlp_bias", "qk_norm"):
        assert {getattr(spec, name) for spec in specs} == {False, True}
    assert any(len(path) > 512 for world in worlds for path in world.paths), "some chunks of attention"
    assert any(world.parents.count(-1) == 3 for world in worlds) and any(len(world.cuts) == 2 for world in worlds)


def numbers(dice: random.Random, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(dice.getrandbits(32)))


def settings(lib: Library) -> Iterator[None]:
    """Every number of threads and every instruction set that gives one set of bits."""
    for isa in same_as(lib.available[0], lib):
        for threads in (1, 2, 3):
            lib.use(isa)
            lib.set_threads(threads)
            yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_linear_layer_of_any_size(dtype: torch.dtype, lib: Library) -> None:
    """And its sums are those of float64, but for rounding."""
    dice = random.Random(f"linear {dtype}")
    for outputs in (*range(1, 101), 500, 1537):
        inputs = dice.choice((1, 2, 3, 7, 15, 17, 64, 127, 128, 129, 200, 255, 897))
        weight, bias = numbers(dice, outputs, inputs).to(dtype), numbers(dice, outputs) if dice.random() < 0.5 else None
        layer, x = Linear.pack(weight, bias), numbers(dice, 45, inputs)
        lib.set_threads(1)
        truth = torch.cat([layer(row[None]) for row in x])
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        sizes = torch.nn.functional.linear(x.double().abs(), weight.double().abs())
        assert ((truth - exact).abs() <= 1e-6 * (sizes + exact.abs())).all(), (outputs, inputs)
        for _ in settings(lib):
            rows = dice.sample(range(45), dice.randint(1, 45))
            assert torch.equal(layer(x[rows]), truth[rows]), (outputs, inputs, rows, lib.isa, lib.threads)


def test_a_linear_layer_on_large_sizes(lib: Library) -> None:
    """Several chunks of work for each thread; more rows than a tile has."""
    dice = random.Random("large")
    layers = ((4864, 896, torch.bfloat16), (1536, 1536, torch.float16), (900, 4864, torch.float32))
    for outputs, inputs, dtype in layers:
        layer, x = Linear.pack(numbers(dice, outputs, inputs).to(dtype)), numbers(dice, 100, inputs)
        lib.set_threads(1)
        truth = torch.cat([layer(row[None]) for row in x[:50]])
        for _ in settings(lib):
            for count in (1, 2, dice.randint(3, 40), 50):
                rows = dice.sample(range(50), count)
                assert torch.equal(layer(x[rows]), truth[rows]), (outputs, inputs, rows, lib.isa, lib.threads)
            assert torch.equal(layer(x)[:50], truth)


@pytest.mark.parametrize("inputs", [64, 65])
def test_rows_that_do_not_lie_one_after_the_other(inputs: int, lib: Library) -> None:
    dice = random.Random(inputs)
    layer, x = Linear.pack(numbers(dice, 70, inputs)), numbers(dice, 40, inputs)
    truth = layer(x)
    wide = torch.full((40, 3 * inputs), torch.nan)
    wide[:, inputs : 2 * inputs] = x
    assert torch.equal(layer(wide[:, inputs : 2 * inputs]), truth)
    assert torch.equal(layer(x.T.contiguous().T), truth)
    assert torch.equal(layer(torch.stack([x, x], -1)[..., 1]), truth)
    assert torch.equal(layer(x.flip(0)[::2]), truth.flip(0)[::2])
    assert torch.equal(layer(x[:1].expand(5, -1)), truth[:1].expand(5, -1))
    assert layer(x[:0]).shape == (0, 70)


def test_layers_whose_panels_take_turns(lib: Library) -> None:
    dice = random.Random("turns")
    for outputs in (16, 33, 200):
        weights = [numbers(dice, outputs, 77) for _ in range(2)]
        biases, x = [numbers(dice, outputs) for _ in weights], numbers(dice, 9, 77)
        both, padded = Linear.interleaved(weights, biases)(x), -(-outputs // 16) * 16
        panels = both.view(9, -1, 2, 16)
        for turn in range(2):
            found = panels[:, :, turn].reshape(9, padded)[:, :outputs]
            assert torch.equal(found, Linear.pack(weights[turn], biases[turn])(x))


def test_cuts_of_a_sum() -> None:
    for inputs in (*range(1, 400), 896, 1536, 4864):
        for unit in (2, 16):
            cuts = even_cuts(inputs, unit)
            assert len(cuts) == 9 and cuts == sorted(cuts) and (cuts[0], cuts[-1]) == (0, inputs)
            assert all(cut % 2 == 0 for cut in cuts[:-1])
