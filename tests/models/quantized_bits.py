"""Quantised matrices of checkpoints have the bits of the published definitions, whole and in parts.

    python -m tests.models.quantized_bits --seeds 5

The test suite takes one shape of each format; this takes all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from stages.checkpoint.checkpoint import Checkpoint
from stages.quantization.matrix import QuantizedMatrix
from tests.models.packed_tensors import CASES, Packed

SHAPES = ((7, 96), (48, 160), (5, 40), (136, 300), (33, 257), (1, 32))
MODULE = "model.layers.0.mlp.up_proj"
KEY = f"{MODULE}.weight"


def checkpoint_of(folder: Path, packed: Packed) -> Checkpoint:
    """One matrix, in a directory of its own."""
    tensors = {f"{MODULE}.{suffix}": tensor.contiguous() for suffix, tensor in packed.tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": packed.config}))
    return Checkpoint(folder)


def parts(size: int, start: int = 0) -> list[slice]:
    """Parts of ``size`` numbers: all, from a word's middle on, of less than a word, the last ones."""
    found = [slice(start, size), slice(size // 3, size), slice(size // 2, size // 2 + 2), slice(max(0, size - 3), size)]
    return [part for part in (*found, slice(32, 64), slice(64, size)) if part.start < min(part.stop, size)]


def check(folder: Path, name: str, shape: tuple[int, int], seed: int, is_thorough: bool = True) -> None:
    """One random matrix of the format ``name``: what is read equals what it should be, bit for bit. ``is_thorough``:
    with all parts of rows and of columns together."""
    packed = CASES[name](np.random.default_rng(seed), *shape)
    checkpoint = checkpoint_of(folder, packed)
    packing = checkpoint.quantized.packing(KEY)
    assert packing is not None
    checkpoint.quantized.refuse_unlike(KEY, packing, shape)

    def agrees(part: tuple[slice, ...] | None) -> None:
        matrix = checkpoint.matrices([KEY], torch.bfloat16, part and {KEY: part})[KEY]
        assert isinstance(matrix, QuantizedMatrix)
        assert np.array_equal(matrix.dense().numpy(), packed.numbers[part or ...]), (name, shape, seed, part)

    agrees(None)
    agrees((parts(shape[0])[1],))
    both = parts(shape[0]), parts(shape[1])
    for part in itertools.product(*both) if is_thorough else zip(*both, strict=False):
        agrees(part)
    tensor = checkpoint.read([KEY], torch.float16)[KEY]
    assert torch.equal(tensor, torch.from_numpy(packed.numbers).half()), (name, shape, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    count = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as folder:
        for name, shape, seed in itertools.product(CASES, SHAPES, range(count)):
            check(Path(folder), name, shape, seed)
    print(f"{len(CASES)} formats, {len(SHAPES)} shapes, {count} seeds: all bits equal")


if __name__ == "__main__":
    main()
