"""Llama 3's scaling of rotary frequencies, found again in the factors that a GGUF file has of it.

A converter writes the quotient of old and new frequencies to ``rope_freqs.weight`` and drops what it was made from.
Computing with the quotients gives frequencies that are a rounding off transformers'. So the numbers of config.json are
looked for, such that the file gives the tokens of the checkpoint that it was made of.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import product
from typing import Any

from stages.checkpoint.folder import AGAIN, refuse, refuse_system
from stages.checkpoint.gguf_file import GGUFFile

LOW_HIGH = ((1.0, 4.0), (1.0, 32.0), (1.0, 2.0), (1.0, 8.0), (2.0, 4.0))
"""Pairs of low_freq_factor and high_freq_factor that are tried; all releases of Llama have the first."""
CONTEXTS = [8192, *(1 << bits for bits in range(5, 21) if bits != 13)]
"""Values of original_max_position_embeddings that are tried; all releases of Llama have the first."""
NEAR = 1e-4
"""Two factors are the same one if they differ by less, relatively."""


def llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """rope_scaling of a config.json without its type. Raises CheckpointError where the factors are not Llama 3's."""
    factors = _factors(file, head_dim)
    factor = float(f"{max(factors):.6g}")
    if factor == 1 and min(factors) == 1:
        return {"factor": 1.0, **_named(CONTEXTS[0], *LOW_HIGH[0])}
    for (low, high), context in product(LOW_HIGH, CONTEXTS):
        wanted = scaled(theta, head_dim, factor, context, low, high)
        if all(math.isclose(one, other, rel_tol=NEAR) for one, other in zip(factors, wanted, strict=True)):
            return {"factor": factor, **_named(context, low, high)}
    refuse(f"{file.path}: the factors in rope_freqs.weight are not of Llama 3's kind", "use the model's directory")


def _named(context: int, low: float, high: float) -> dict[str, Any]:
    return {"original_max_position_embeddings": context, "low_freq_factor": low, "high_freq_factor": high}


def scaled(theta: float, head_dim: int, factor: float, context: int, low: float, high: float) -> list[float]:
    """What frequencies are divided by: 1 for waves shorter than context / high, ``factor`` for those longer than
    context / low, something between for the rest."""
    found = []
    for index in range(0, head_dim, 2):
        rotations = context / (2 * math.pi * theta ** (index / head_dim))  # within the context
        keep = min(1.0, max(0.0, (rotations - low) / (high - low)))
        found.append(1 / ((1 - keep) / factor + keep))
    return found


def _factors(file: GGUFFile, head_dim: int) -> Sequence[float]:
    tensor = file.tensors["rope_freqs.weight"]
    if tensor.kind != "F32" or tensor.shape != (head_dim // 2,):
        refuse(f"{file.path}: rope_freqs.weight is no vector of {head_dim // 2} numbers in F32", AGAIN)
    try:
        with tensor.path.open("rb") as stream:
            stream.seek(tensor.offset)
            found = struct.unpack(f"<{head_dim // 2}f", stream.read(tensor.nbytes))
    except OSError as error:
        refuse_system(tensor.path, error)
    except struct.error:
        refuse(f"{tensor.path} has changed while it was read", AGAIN)
    if not all(math.isfinite(one) and one > 0 for one in found):
        refuse(f"{file.path}: rope_freqs.weight has a factor that is not positive", AGAIN)
    return found
