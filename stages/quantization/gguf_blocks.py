"""Blocks of GGUF's quantised tensors as QuantizedMatrix: the file's bits, one code a byte.

A row is a sequence of blocks. The older types have blocks of 32 numbers with one float16 scale, and some a float16
minimum. The K types have blocks of 256 with two levels: a float16 scale, times a small integer for each 16 or 32
numbers. ``dense`` of the result has the bits of the gguf package's dequantisation.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.quantization.matrix import QuantizedMatrix

Bytes = npt.NDArray[np.uint8]
SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, None]


def decode(kind: str, rows: Bytes, block_nbytes: int) -> QuantizedMatrix:
    """``rows``: uint8 [outputs, bytes of a row] of a tensor of the type ``kind``, as "Q4_K". Raises ValueError where a
    scale or a minimum is not finite."""
    blocks = rows.reshape(len(rows), rows.shape[1] // block_nbytes, block_nbytes)
    found = DECODERS[kind](blocks)
    for tensor in (found.scales, found.minima):
        if tensor is not None and not tensor.isfinite().all():
            row = int((~tensor.isfinite()).any(1).nonzero()[0, 0])
            raise ValueError(f"a scale of row {row} is not finite")
    return found


def _halves(blocks: Bytes, at: int) -> Tensor:
    """The float16 at the byte ``at`` of each block: [outputs, blocks]."""
    return torch.from_numpy(blocks[:, :, at : at + 2].copy().view(np.float16)[:, :, 0])


def _flat(parts: npt.NDArray[np.generic]) -> Tensor:
    """[outputs, all the rest]."""
    return torch.from_numpy(np.ascontiguousarray(parts).reshape(len(parts), math.prod(parts.shape[1:])))


def _nibbles(packed: Bytes) -> Bytes:
    """The low halves of ``packed`` [..., n], then the high ones: [..., 2 n]."""
    return np.concatenate((packed & 15, packed >> 4), -1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """Bits of 4 bytes [..., 4], lowest first, as 16 [..., 32]."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << np.uint8(4)


def _q4(blocks: Bytes, has_minimum: bool) -> QuantizedMatrix:
    start = 4 if has_minimum else 2
    codes = _flat(_nibbles(blocks[:, :, start:]))
    return _one_level("q4_1" if has_minimum else "q4_0", 4, codes, blocks, has_minimum)


def _q5(blocks: Bytes, has_minimum: bool) -> QuantizedMatrix:
    start = 4 if has_minimum else 2
    codes = _flat(_nibbles(blocks[:, :, start + 4 :]) | _fifth_bits(blocks[:, :, start : start + 4]))
    return _one_level("q5_1" if has_minimum else "q5_0", 5, codes, blocks, has_minimum)


def _q8_0(blocks: Bytes) -> QuantizedMatrix:
    return _one_level("q8_0", 8, _flat(blocks[:, :, 2:] ^ 128), blocks, has_minimum=False)


def _one_level(name: str, bits: int, codes: Tensor, blocks: Bytes, has_minimum: bool) -> QuantizedMatrix:
    zero = 0 if has_minimum else 1 << (bits - 1)
    minima = -_halves(blocks, 2) if has_minimum else None
    return QuantizedMatrix(name, bits, codes, _halves(blocks, 0), 32, 32, zero, minima=minima)


def _two_bits(packed: Bytes) -> Bytes:
    """The codes of ``packed`` [outputs, blocks, 64]: of each half 4 times 32 codes, [outputs, blocks, 2, 4, 32]."""
    return packed.reshape(*packed.shape[:2], 2, 1, 32) >> SHIFTS & np.uint8(3)


def _q2_k(blocks: Bytes) -> QuantizedMatrix:
    levels = blocks[:, :, :16]
    return QuantizedMatrix(
        "q2_k",
        2,
        _flat(_two_bits(blocks[:, :, 16:80])),
        _halves(blocks, 80),
        16,
        256,
        factors=_flat((levels & 15).astype(np.int16)),
        minima=_halves(blocks, 82),
        minimum_factors=_flat((levels >> 4).astype(np.int16)),
    )


def _q3_k(blocks: Bytes) -> QuantizedMatrix:
    high = np.unpackbits(blocks[:, :, None, :32], axis=2, bitorder="little")  # [outputs, blocks, 8, 32]
    codes = _two_bits(blocks[:, :, 32:96]) | high.reshape(*high.shape[:2], 2, 4, 32) << 2
    packed = blocks[:, :, 96:108]
    upper = packed[:, :, None, 8:] >> SHIFTS & 3  # [outputs, blocks, 4, 4]
    factors = _nibbles(packed[:, :, :8]) | upper.reshape(*upper.shape[:2], 16) << 4
    signed = _flat(factors.astype(np.int16) - 32)
    return QuantizedMatrix("q3_k", 3, _flat(codes), _halves(blocks, 108), 16, 256, 4, factors=signed)


def _levels(packed: Bytes) -> tuple[Tensor, Tensor]:
    """Factors of scales and of minima, 6 bits each, from 12 bytes a block: int16 [outputs, 8 a block]."""
    first, second, rest = packed[:, :, :4], packed[:, :, 4:8], packed[:, :, 8:]
    scales = np.concatenate((first & 63, rest & 15 | first >> 6 << 4), -1)
    minima = np.concatenate((second & 63, rest >> 4 | second >> 6 << 4), -1)
    return _flat(scales.astype(np.int16)), _flat(minima.astype(np.int16))


def _pairs(packed: Bytes) -> Bytes:
    """``packed`` [outputs, blocks, 128]: 4 times 32 low halves and 32 high ones, [outputs, blocks, 8, 32]."""
    parts = _nibbles(packed.reshape(*packed.shape[:2], 4, 32))
    return parts.reshape(*packed.shape[:2], 8, 32)


def _k_with_minima(name: str, bits: int, codes: Bytes, blocks: Bytes) -> QuantizedMatrix:
    factors, minimum_factors = _levels(blocks[:, :, 4:16])
    return QuantizedMatrix(
        name,
        bits,
        _flat(codes),
        _halves(blocks, 0),
        32,
        256,
        factors=factors,
        minima=_halves(blocks, 2),
        minimum_factors=minimum_factors,
    )


def _q4_k(blocks: Bytes) -> QuantizedMatrix:
    return _k_with_minima("q4_k", 4, _pairs(blocks[:, :, 16:]), blocks)


def _q5_k(blocks: Bytes) -> QuantizedMatrix:
    high = np.unpackbits(blocks[:, :, None, 16:48], axis=2, bitorder="little") << np.uint8(4)
    return _k_with_minima("q5_k", 5, _pairs(blocks[:, :, 48:]) | high, blocks)


def _q6_k(blocks: Bytes) -> QuantizedMatrix:
    low = _nibbles(blocks[:, :, :128].reshape(*blocks.shape[:2], 2, 64)).reshape(*blocks.shape[:2], 2, 4, 32)
    codes = low | _two_bits(blocks[:, :, 128:192]) << 4
    factors = _flat(blocks[:, :, 192:208].view(np.int8).astype(np.int16))
    return QuantizedMatrix("q6_k", 6, _flat(codes), _halves(blocks, 208), 16, 256, 32, factors=factors)


DECODERS: dict[str, Callable[[Bytes], QuantizedMatrix]] = {
    "Q4_0": lambda blocks: _q4(blocks, has_minimum=False),
    "Q4_1": lambda blocks: _q4(blocks, has_minimum=True),
    "Q5_0": lambda blocks: _q5(blocks, has_minimum=False),
    "Q5_1": lambda blocks: _q5(blocks, has_minimum=True),
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""By type; each takes uint8 [outputs, blocks of a row, bytes of a block]."""
