"""Blocks of GGUF files decode to the bits of the gguf package, and to what a layout says of one block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stages.checkpoint.gguf_file import BLOCKS, OTHERS
from stages.quantization.gguf_blocks import DECODERS, decode
from tests.models.gguf_files import KINDS, random_blocks

SHAPES = ((1, 1), (1, 7), (3, 5), (16, 2), (33, 3))
"""Rows, and blocks of a row."""
BITS = {"Q8_0": 8, "Q6_K": 6, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q3_K": 3, "Q2_K": 2}


@pytest.mark.parametrize("kind", list(DECODERS))
def test_numbers_have_the_bits_of_the_reference(kind: str) -> None:
    gguf: Any = pytest.importorskip("gguf", reason="the extra peers is not installed")
    _, block, nbytes = KINDS[kind]
    rng = np.random.default_rng(7)
    for rows, blocks in SHAPES:
        data = random_blocks(rng, kind, rows, blocks * block)
        wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
        found = decode(kind, data, nbytes).dense().numpy()
        assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32)), f"seed 7, {rows} rows of {blocks} blocks"


def test_types_are_those_of_the_package() -> None:
    gguf: Any = pytest.importorskip("gguf", reason="the extra peers is not installed")
    for number, (name, block, nbytes) in BLOCKS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name and gguf.GGML_QUANT_SIZES[kind] == (block, nbytes)
    for number, name in OTHERS.items():
        assert gguf.GGMLQuantizationType(number).name == name


@pytest.mark.parametrize("kind", list(DECODERS))
def test_codes_take_as_many_bits_as_the_type_says(kind: str) -> None:
    data = random_blocks(np.random.default_rng(8), kind, 8, 512)
    matrix = decode(kind, data, KINDS[kind][2])
    assert matrix.shape == (8, 512) and matrix.bits == BITS[kind]
    assert int(matrix.codes.max()) == 2**matrix.bits - 1 and int(matrix.codes.min()) == 0
    assert matrix.span == KINDS[kind][1] and 512 % matrix.group == 0


def test_a_block_of_each_older_type_by_hand() -> None:
    half = np.float16(0.5).tobytes()
    packed = np.arange(16, dtype=np.uint8) | np.arange(16, dtype=np.uint8)[::-1] << 4
    codes = np.concatenate((np.arange(16), np.arange(16)[::-1]))
    blocks = {
        "Q4_0": (half + packed.tobytes(), 0.5 * (codes - 8.0)),
        "Q4_1": (half + half + packed.tobytes(), 0.5 * codes + 0.5),
        "Q5_0": (half + bytes((255, 255, 0, 0)) + packed.tobytes(), 0.5 * (codes + 16.0 * (np.arange(32) < 16) - 16)),
        "Q8_0": (half + bytes(range(112, 144)), 0.5 * np.array([*range(112, 128), *range(-128, -112)])),
    }
    for kind, (data, wanted) in blocks.items():
        found = decode(kind, np.frombuffer(data, np.uint8)[None], KINDS[kind][2]).dense()[0].tolist()
        assert found == wanted.tolist(), kind
