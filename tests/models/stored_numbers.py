"""The published definitions of stored quantised matrices, with numpy: what tests compare with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

Array = npt.NDArray[Any]


def read_all(folder: Path) -> dict[str, Array]:
    """All tensors of a model directory by name; bfloat16 as float32."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                tensor = file.get_tensor(name)
                found[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return found


def spread(scales: Array, inputs: int) -> Array:
    """Float32 [outputs, inputs]: of each input its group's scale."""
    return np.repeat(scales, inputs // scales.shape[1], 1).astype(np.float32)


def pack_quantized(tensors: Mapping[str, Array], stem: str, bits: int) -> Array:
    """compressed-tensors: the codes of a row follow each other from a word's lowest bits on, 2^(bits - 1) too large."""
    words = tensors[f"{stem}.weight_packed"].view(np.uint32).astype(np.int64)
    outputs, inputs = tensors[f"{stem}.weight_shape"].tolist()
    shifts = np.arange(0, 32, bits)
    codes = ((words[:, :, None] >> shifts) & (2**bits - 1)).reshape(len(words), -1)
    assert not codes[:, inputs:].any(), "rows are filled up with 0"
    numbers = (codes[:outputs, :inputs] - 2 ** (bits - 1)).astype(np.float32)
    return numbers * spread(tensors[f"{stem}.weight_scale"], inputs)


def e3m2(code: int) -> float:
    """Sign, three bits of exponent with a bias of 3, two of mantissa."""
    sign, exponent, mantissa = -1 if code >> 5 else 1, code >> 2 & 7, code & 3
    return sign * (mantissa / 4 * 2.0**-2 if exponent == 0 else (1 + mantissa / 4) * 2.0 ** (exponent - 3))


E3M2 = np.array([e3m2(code) for code in range(64)], np.float32)


def fp6_planes(tensors: Mapping[str, Array], stem: str) -> Array:
    """FP6 in bit planes: sign and exponent in weight_high, the mantissa in weight_low."""
    outputs, inputs = tensors[f"{stem}.weight_shape"].tolist()
    high, low = tensors[f"{stem}.weight_high"], tensors[f"{stem}.weight_low"]
    upper = np.stack([high & 15, high >> 4], -1).reshape(outputs, -1)[:, :inputs]
    lower = np.stack([low >> shift & 3 for shift in (0, 2, 4, 6)], -1).reshape(outputs, -1)[:, :inputs]
    return np.asarray(E3M2[upper * 4 + lower] * spread(tensors[f"{stem}.weight_scale"], inputs))
