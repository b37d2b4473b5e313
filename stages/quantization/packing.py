"""The tensors in which a checkpoint stores a quantised matrix, and what its config.json says of them.

int8 and int4 are stored as compressed-tensors' ``pack-quantized``, weights only, which vLLM and transformers read:
``weight_packed``, int32 [outputs, words], whose lowest bits hold the first code; ``weight_scale`` [outputs, groups];
``weight_shape``, int64 [2]. Codes are unsigned: an integer n is stored as n + 2^(bits - 1). Rows are filled up with 0.

FP6 has no standard; its two planes are tensors of their own (see fp6.py), so that the 4-bit plane can be read alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stages.quantization.bit_fields import bytes_of
from stages.quantization.fp6 import FORMAT, HIGH, LOW, METHOD, PER_BYTE
from stages.quantization.matrix import QuantizedMatrix
from stages.quantization.rounding import FORMATS

WORD_BITS = 32


def stored_shapes(outputs: int, inputs: int, format: str, group: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For a matrix in ``format``, by the ends of their names, the tensors whose rows are its rows: the dtype in
    safetensors' spelling ("": that of the scales) and the shape."""
    widths = {"weight_packed": ("I32", -(-inputs * FORMATS[format].bits // WORD_BITS))}
    if format == "fp6":
        widths = {name: ("U8", -(-inputs // per)) for name, per in PER_BYTE.items()}
    widths["weight_scale"] = "", inputs // group if group else 1
    return {name: (dtype, (outputs, width)) for name, (dtype, width) in widths.items()}


def stored_tensors(matrix: QuantizedMatrix) -> dict[str, Tensor]:
    """The tensors of ``matrix`` or of some of its rows, named as in ``stored_shapes``."""
    if matrix.format == "fp6":
        planes = {HIGH: bytes_of(matrix.codes >> 2, 4), LOW: bytes_of(matrix.codes & 3, 2)}
        return planes | {"weight_scale": matrix.scales}
    packed = bytes_of(matrix.codes, matrix.bits, WORD_BITS)
    return {"weight_packed": packed.view(torch.int32), "weight_scale": matrix.scales}


def quantization_config(format: str, group: int) -> dict[str, Any]:
    """``quantization_config`` of a model whose layers' linears are in ``format``, but for heads and routers."""
    if format == "fp6":
        return {"quant_method": METHOD, "format": FORMAT, "group_size": group or None}
    weights = {
        "num_bits": FORMATS[format].bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if group else "channel",
        "group_size": group or None,
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ["lm_head", r"re:.*\.gate$"],
        "config_groups": {"group_0": scheme},
    }
