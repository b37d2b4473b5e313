"""Random quantised matrices in every format that kernels have, for tests of kernels and of worlds."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.quantization.matrix import QuantizedMatrix

Generator = torch.Generator


def _integers(generator: Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


def _scales(generator: Generator, dtype: torch.dtype, outputs: int, count: int, size: float = 1.0) -> Tensor:
    return ((torch.rand(outputs, count, generator=generator) + 0.5) * size).to(dtype)


def symmetric(
    generator: Generator, outputs: int, inputs: int, bits: int, group: int, dtype: torch.dtype = torch.float16
) -> QuantizedMatrix:
    """Whole numbers around half of their range."""
    codes = _integers(generator, 0, 2**bits, outputs, inputs).to(torch.uint8)
    scales = _scales(generator, dtype, outputs, -(-inputs // group), 2.0 / 2**bits)
    return QuantizedMatrix(f"int{bits}", bits, codes, scales, group, group, 2 ** (bits - 1))


def with_zeros(
    generator: Generator, outputs: int, inputs: int, bits: int, group: int, dtype: torch.dtype = torch.float16
) -> QuantizedMatrix:
    """Whole numbers with a zero point of each group."""
    codes = _integers(generator, 0, 2**bits, outputs, inputs).to(torch.uint8)
    groups = -(-inputs // group)
    zeros = _integers(generator, 0, 2**bits, outputs, groups).to(torch.uint8)
    scales = _scales(generator, dtype, outputs, groups, 2.0 / 2**bits)
    return QuantizedMatrix(f"int{bits}", bits, codes, scales, group, group, zeros)


def two_levels(
    generator: Generator, outputs: int, inputs: int, bits: int, group: int, has_minima: bool
) -> QuantizedMatrix:
    """As the K formats of GGUF: integer factors of groups, scales of 256 inputs, minima likewise or a zero point."""
    codes = _integers(generator, 0, 2**bits, outputs, inputs).to(torch.uint8)
    groups, spans = -(-inputs // group), -(-inputs // 256)
    low, high = (0, 64) if has_minima else (-32, 32) if bits == 3 else (-128, 128)
    factors = _integers(generator, low, high, outputs, groups).to(torch.int16)
    scales = _scales(generator, torch.float16, outputs, spans, 2.0 / 2**bits / high)
    minima = _scales(generator, torch.float16, outputs, spans, 1.0 / high) if has_minima else None
    minimum_factors = _integers(generator, 0, 64, outputs, groups).to(torch.int16) if has_minima else None
    zeros = 0 if has_minima else 2 ** (bits - 1)
    name = f"q{bits}_k"
    return QuantizedMatrix(name, bits, codes, scales, group, 256, zeros, factors, minima, minimum_factors)


def small_floats(generator: Generator, outputs: int, inputs: int, kind: str, group: int) -> QuantizedMatrix:
    """Floats of 4, 6 or 8 bits, all of them numbers."""
    bits = 1 + sum(map(int, kind[1::2]))
    codes = _integers(generator, 0, 2**bits, outputs, inputs).to(torch.uint8)
    if kind == "e4m3":
        codes[codes % 128 == 127] = 1
    scales = _scales(generator, torch.float32, outputs, -(-inputs // group), 0.1)
    return QuantizedMatrix(f"fp{bits}", bits, codes, scales, group, group, kind=kind)


FORMATS = {
    "int8_rows": lambda g, o, i: symmetric(g, o, i, 8, max(32, -(-i // 32) * 32), torch.float32),
    "int8_bf16_128": lambda g, o, i: symmetric(g, o, i, 8, 128, torch.bfloat16),
    "q8_0": lambda g, o, i: symmetric(g, o, i, 8, 32),
    "int8_zeros": lambda g, o, i: with_zeros(g, o, i, 8, 64),
    "int4_32": lambda g, o, i: symmetric(g, o, i, 4, 32),
    "int4_128": lambda g, o, i: symmetric(g, o, i, 4, 128, torch.bfloat16),
    "int4_zeros": lambda g, o, i: with_zeros(g, o, i, 4, 128),
    "int4_zeros_16": lambda g, o, i: with_zeros(g, o, i, 4, 16),
    "int3_64": lambda g, o, i: with_zeros(g, o, i, 3, 64),
    "int2_32": lambda g, o, i: with_zeros(g, o, i, 2, 32),
    "q3_k": lambda g, o, i: two_levels(g, o, i, 3, 16, has_minima=False),
    "q2_k": lambda g, o, i: two_levels(g, o, i, 2, 16, has_minima=True),
    "q4_k": lambda g, o, i: two_levels(g, o, i, 4, 32, has_minima=True),
    "q5_k": lambda g, o, i: two_levels(g, o, i, 5, 32, has_minima=True),
    "q6_k": lambda g, o, i: two_levels(g, o, i, 6, 16, has_minima=False),
    "fp6": lambda g, o, i: small_floats(g, o, i, "e3m2", 128),
    "fp6_rows": lambda g, o, i: small_floats(g, o, i, "e3m2", max(32, -(-i // 32) * 32)),
    "fp6-4": lambda g, o, i: small_floats(g, o, i, "e3m0", 64),
    "fp8": lambda g, o, i: small_floats(g, o, i, "e4m3", 128),
}
"""From a generator, outputs and inputs to a matrix."""
