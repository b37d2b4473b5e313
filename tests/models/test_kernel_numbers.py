"""The kernels' numbers are right: against transformers, and their own functions against double precision."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeinfer.core.slots import batch_in_order
from stages.checkpoint.checkpoint import Checkpoint
from stages.checkpoint.spec import ModelSpec, RopeSpec
from stages.kernels.library import BEST_NBYTES, CHOSEN, CHead, Library, library
from stages.kernels.linear import Linear
from stages.models.kernel_shard import KernelShard
from stages.models.rope import inverse_frequencies
from tests.models.kernel_bits import logits_of, push
from tests.models.tiny import CONFIGS, make_tiny
from tests.models.walk import Reference, load_shards

pytestmark = pytest.mark.skipif(library() is None, reason="there is no library of kernels")
TEXT = [(17 * place * place + 5) % 512 for place in range(300)]
"""More than a chunk of attention."""
ISAS = () if library() is None else library().available  # type: ignore[union-attr]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=ISAS)
def lib(request: pytest.FixtureRequest) -> Iterator[Library]:
    found = library()
    assert found is not None
    before = found.isa
    found.use(request.param)
    yield found
    found.use(before)


def logits(folder: Path, dtype: torch.dtype) -> Tensor:
    shards = load_shards(folder, 2, dtype, capacity=len(TEXT), kind="kernels")
    return logits_of(shards[-1], push(shards, batch_in_order(TEXT))[-1])[0]


@torch.no_grad()
def theirs(folder: Path) -> Tensor:
    found: Tensor = Reference(folder).model(torch.tensor([TEXT])).logits[0]
    return found


@pytest.mark.parametrize("architecture", CONFIGS)
def test_logits_in_float32_are_those_of_transformers(architecture: str, lib: Library, tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, architecture, seed=2, max_position_embeddings=512, num_hidden_layers=4)
    ours, truth = logits(folder, torch.float32), theirs(folder)
    assert (ours - truth).norm() <= 1e-5 * truth.norm()
    assert (ours - truth).abs().max() <= 1e-4 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_in_16_bits_are_close(dtype: torch.dtype, lib: Library, tmp_path: Path) -> None:
    """To those of the same weights in float32. Only keys and values are rounded: half a unit in the last place each."""
    folder = make_tiny(tmp_path, "Qwen3ForCausalLM", 2, dtype, max_position_embeddings=512, initializer_range=0.1)
    ours, truth = logits(folder, dtype), theirs(folder)
    assert (ours - truth).norm() <= 2 * torch.finfo(dtype).eps * truth.norm()
    assert (logits(folder, torch.float32) - truth).norm() <= 1e-5 * truth.norm()


def rotations(lib: Library, frequencies: Tensor, positions: int, factor: float = 1.0) -> Tensor:
    found = torch.empty((positions, 2 * len(frequencies)))
    lib.binary.pipeinfer_rotations(frequencies.data_ptr(), len(frequencies), factor, positions, found.data_ptr())
    return found


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_cosines_and_sines(theta: float, lib: Library) -> None:
    """Within a unit in the last place of those of the angle in float32, up to 131,072 positions."""
    positions, (frequencies, _) = 131072, inverse_frequencies(RopeSpec(theta=theta), 32, 131072)
    found = rotations(lib, frequencies, positions).numpy()
    angles = (torch.arange(positions)[:, None].float() * frequencies).double().numpy()
    for part, exact in ((found[:, :16], np.cos(angles)), (found[:, 16:], np.sin(angles))):
        units = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        assert (np.abs(part - exact) <= units).all()
        assert (part == exact.astype(np.float32)).mean() > 0.999999
    assert torch.equal(rotations(lib, frequencies[:3], 9, 0.5), rotations(lib, frequencies[:3], 9) * 0.5)


def test_e_to_the_power(lib: Library) -> None:
    """Within 2 units in the last place. Of two blocks of logits the second has one, d above the highest of the first:
    the total is 1 + e^d, in float64."""
    count = 20001
    weight = torch.zeros(257, 2)
    weight[1:256, 1], weight[256, 0] = -1000.0, 18.0
    head, norm = Linear.pack(weight), torch.ones(16)
    x = torch.stack([torch.linspace(-1, 0, count), torch.ones(count)], -1)
    normed, logits, chosen = torch.zeros((count, 16)), torch.empty((count, 257)), np.zeros(count, CHOSEN)
    blocks = np.empty((count, 2 * BEST_NBYTES), np.uint8)
    given = CHead(ctypes.addressof(head.c), norm.data_ptr(), None, None, None, 1e-6, 257)
    scratch = normed.data_ptr(), blocks.ctypes.data
    lib.kernels.head(ctypes.addressof(given), x.data_ptr(), count, *scratch, chosen.ctypes.data, logits.data_ptr())
    assert not chosen["token"].any() and not chosen["highest"].any()
    exact = np.exp(logits[:, 256].double().numpy())
    assert exact.min() < 2e-8
    units = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(chosen["total"] - 1 - exact) <= 2 * units + 2**-52).all()


EVERY = torch.arange(65536, dtype=torch.int32).to(torch.int16)
"""All patterns of 16 bits."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_as_torch_reads_it(dtype: torch.dtype, lib: Library) -> None:
    """As an embedding, and as a weight."""
    numbers = EVERY.view(dtype)
    table = Linear.pack(numbers.view(-1, 8))
    tokens, found = torch.arange(8192), torch.empty((8192, 8))
    lib.kernels.embed(ctypes.addressof(table.c), tokens.data_ptr(), len(tokens), found.data_ptr())
    same(found.view(-1), numbers.float())
    finite = numbers[numbers.isfinite()]
    column = Linear.pack(finite[:, None])
    assert torch.equal(column(torch.ones(1, 1))[0], finite.float() + 0.0)


def same(found: Tensor, truth: Tensor) -> None:
    """Equal by bits; what is not a number may be any that is not."""
    assert torch.equal(found.isnan(), truth.isnan())
    kept = ~truth.isnan()
    assert torch.equal(found[kept].view(torch.int32), truth[kept].view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_keys_and_values_are_rounded_as_torch_rounds_them(dtype: torch.dtype, lib: Library, tmp_path: Path) -> None:
    """Every number of 16 bits, the middle between it and the next, and the next numbers on both sides of that. What no
    slot may hold is 0: what is not finite, or 1e18 and more."""
    size = 256
    config = {"hidden_size": size, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": size // 4}

    def edit(model: Any) -> None:
        model.model.layers[0].self_attn.v_proj.weight.copy_(torch.eye(size))

    more = {"num_hidden_layers": 1, "intermediate_size": 16}
    folder = make_tiny(tmp_path, "LlamaForCausalLM", 0, edit=edit, **config, **more)
    shard = KernelShard.load(ModelSpec.read(folder), Checkpoint(folder), range(1), dtype, 1)
    numbers = EVERY.view(torch.bfloat16 if dtype is torch.float32 else dtype)
    exact = numbers[numbers.isfinite()].float()
    exact = exact[exact.abs().argsort()]
    between = ((exact[:-2].double() + exact[2:].double()) / 2).float()
    near = [torch.nextafter(between, torch.full_like(between, towards)) for towards in (-torch.inf, torch.inf)]
    values = torch.cat([exact, between, *near])
    values = torch.cat([values, values.new_zeros(-len(values) % size)]).view(-1, size)
    truth = values.to(dtype).float()
    truth[(values.abs() >= 1e18) | ~truth.isfinite()] = 0.0
    weights, x = shard._layers[0].tensors[0], torch.ones(1, size)
    assert len(weights) == size
    shard._c.eps = 0.0  # of a row of ones the norm is then the weights
    for row, expected in zip(values, truth, strict=True):
        with torch.inference_mode():
            weights.copy_(row)
        push_any(shard, x)
        assert torch.equal(shard._kv[0, 1, :, 0, : size // 4].reshape(-1).float(), expected)


def push_any(shard: KernelShard, x: Tensor) -> None:
    """A row at position 0, finite or not."""
    for _ in shard.forward(batch_in_order([0]), x):
        pass


def test_activations_that_do_not_lie_one_after_the_other(tmp_path: Path) -> None:
    """What is received lies so; a caller's own tensor may not."""
    first, last = load_shards(make_tiny(tmp_path, "LlamaForCausalLM"), 2, kind="kernels")
    batch = batch_in_order(TEXT[:9])
    hidden = push([first], batch)[0]
    truth = push([last], batch, hidden=hidden)[0]
    for other in (hidden.T.contiguous().T, torch.stack([hidden, hidden], -1)[..., 0], hidden.numpy()):
        assert torch.equal(push([last], batch, hidden=other)[0], truth)
    assert last.sample(truth.T.contiguous().T, [3, 1], 4) == last.sample(truth, [3, 1], 4)


def test_a_batch_whose_arrays_are_columns_of_a_table(tmp_path: Path) -> None:
    shards = load_shards(make_tiny(tmp_path, "LlamaForCausalLM"), 2, kind="kernels")
    batch = batch_in_order(TEXT[:40])
    truth = push(shards, batch)[-1]
    names = ("tokens", "positions", "slots", "sequence", "prefix", "ancestors", "ancestor_ends")
    table = np.stack([getattr(batch, name) for name in names], -1)
    strided = replace(batch, **{name: table[:, column] for column, name in enumerate(names)})
    assert torch.equal(push(shards, strided)[-1], truth)
