"""Quantised tensors as published definitions have them, in numpy alone: random ones, and what their numbers are.

Codes are taken out of words bit by bit, and scales are multiplied in float32: nothing is shared with
stages/quantization.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Packed:
    """A matrix: its tensors by suffix, what config.json says, and its numbers, float32 [outputs, inputs]."""

    tensors: Tensors
    config: dict[str, Any]
    numbers: Array


def stream(words: Array, bits: int) -> Array:
    """Codes one after another in int32 [rows, words], from the lowest bit of the first word on."""
    each = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    return each.reshape(len(words), -1, bits) @ (1 << np.arange(bits))


def by_word(words: Array, bits: int) -> Array:
    """Codes in int32 [rows, words], 32 // bits in each word."""
    each = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    used = each.reshape(len(words), -1, 32)[:, :, : 32 // bits * bits]
    return used.reshape(len(words), -1, bits) @ (1 << np.arange(bits))


def spread(per_group: Array, group: int, inputs: int) -> Array:
    return np.repeat(per_group, group, axis=1)[:, :inputs]


def random_words(dice: np.random.Generator, *shape: int) -> Array:
    return dice.integers(-(2**31), 2**31, shape, dtype=np.int32)


def random_scales(dice: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.from_numpy(dice.uniform(0.001, 0.1, shape)).to(dtype)


def product(scales: Array, numbers: Array) -> Array:
    """In float32, rounded once."""
    return np.asarray(scales.astype(np.float32) * numbers.astype(np.float32), np.float32)


def gptq(
    dice: np.random.Generator, outputs: int, inputs: int, bits: int, group: int, form: str = "gptq", sym: bool = False
) -> Packed:
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    per = 32 if bits == 3 else 32 // bits
    wide = 3 if bits == 3 else 1
    qweight = random_words(dice, -(-inputs // per) * wide, outputs)
    offset = 1 if form == "gptq" else 0
    qzeros = random_words(dice, groups, -(-outputs // per) * wide)
    if sym:  # codes of the middle in every place
        one = "".join(f"{2 ** (bits - 1) - offset:0{bits}b}"[::-1] for _ in range(32))
        data = np.packbits(np.array([int(bit) for bit in one], np.uint8), bitorder="little").view(np.int32)
        qzeros = np.tile(data, (groups, -(-outputs // 32)))[:, : qzeros.shape[1]]
    scales = random_scales(dice, groups, outputs)
    g_idx = np.arange(inputs, dtype=np.int32) // size
    zeros = (stream(qzeros, bits)[:, :outputs].T + offset) % 2**bits
    codes = stream(qweight.T, bits)[:, :inputs]
    numbers = product(spread(scales.numpy().T, size, inputs), codes - spread(zeros, size, inputs))
    tensors = {"qweight": qweight, "qzeros": qzeros, "g_idx": g_idx}
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": sym,
        "desc_act": False,
        "checkpoint_format": form,
    }
    return Packed({"scales": scales, **as_torch(tensors)}, config, numbers)


def awq(dice: np.random.Generator, outputs: int, inputs: int, group: int, zero_point: bool = True) -> Packed:
    size = inputs if group == -1 else group
    groups, wide = -(-inputs // size), -(-outputs // 8)
    qweight, qzeros = random_words(dice, inputs, wide), random_words(dice, groups, wide)
    if not zero_point:
        qzeros = np.full_like(qzeros, np.uint32(0x88888888).astype(np.int32))
    scales = random_scales(dice, groups, outputs)

    def ordered(words: Array) -> Array:
        found, codes = stream(words, 4), np.zeros((len(words), 8 * wide), np.int64)
        for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            codes[:, output::8] = found[:, place::8]
        return codes[:, :outputs].T

    numbers = product(spread(scales.numpy().T, size, inputs), ordered(qweight) - spread(ordered(qzeros), size, inputs))
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": zero_point, "version": "gemm"}
    return Packed({"scales": scales, **as_torch({"qweight": qweight, "qzeros": qzeros})}, config, numbers)


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """A configuration of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, "dynamic": False, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def scales_of(
    dice: np.random.Generator, strategy: str, outputs: int, inputs: int, group: int, dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    """Scales as ``strategy`` stores them, and how many inputs share one."""
    shapes = {"tensor": (1,), "channel": (outputs, 1), "group": (outputs, -(-inputs // max(1, group)))}
    return random_scales(dice, *shapes[strategy], dtype=dtype), group if strategy == "group" else inputs


def pack_quantized(
    dice: np.random.Generator,
    outputs: int,
    inputs: int,
    bits: int,
    group: int,
    zeros: str = "",
    strategy: str = "group",
) -> Packed:
    """``zeros``: how zero points are stored, "packed" or "plain"; empty for none."""
    per = 32 // bits
    weight_packed = random_words(dice, outputs, -(-inputs // per))
    scales, size = scales_of(dice, strategy, outputs, inputs, group, torch.bfloat16)
    tensors = {"weight_packed": weight_packed, "weight_shape": np.array([outputs, inputs])}
    signed = by_word(weight_packed, bits)[:, :inputs] - 2 ** (bits - 1)
    points: Array = np.zeros((outputs, scales.shape[1]), np.int64)
    if zeros == "packed":
        tensors["weight_zero_point"] = random_words(dice, -(-outputs // per), scales.shape[1])
        points = by_word(tensors["weight_zero_point"].T, bits).T[:outputs] - 2 ** (bits - 1)
    elif zeros:
        tensors["weight_zero_point"] = dice.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), points.shape).astype(np.int8)
        points = tensors["weight_zero_point"].astype(np.int64)
    numbers = product(spread(scales.float().numpy(), size, inputs), signed - spread(points, size, inputs))
    size_said = {"group_size": group} if strategy == "group" else {}
    config = compressed("pack-quantized", num_bits=bits, symmetric=not zeros, strategy=strategy, **size_said)
    return Packed({"weight_scale": scales, **as_torch(tensors)}, config, numbers)


def int_quantized(
    dice: np.random.Generator, outputs: int, inputs: int, strategy: str, symmetric: bool = True, group: int = 0
) -> Packed:
    weight = dice.integers(-128, 128, (outputs, inputs)).astype(np.int8)
    scales, size = scales_of(dice, strategy, outputs, inputs, group, torch.float32)
    tensors = {"weight": weight}
    wide = np.broadcast_to(scales.numpy().reshape(-1, scales.shape[-1]), (outputs, scales.shape[-1]))
    points: Array = np.zeros(scales.shape, np.int8)
    if not symmetric:
        points = tensors["weight_zero_point"] = dice.integers(-128, 128, scales.shape).astype(np.int8)
    offsets = np.broadcast_to(points.astype(np.int64), wide.shape)
    numbers = product(spread(wide, size, inputs), weight.astype(np.int64) - spread(offsets, size, inputs))
    config = compressed("int-quantized", num_bits=8, symmetric=symmetric, strategy=strategy, group_size=group or None)
    return Packed({"weight_scale": scales, **as_torch(tensors)}, config, numbers)


def random_float8(dice: np.random.Generator, outputs: int, inputs: int) -> torch.Tensor:
    """Every finite number of e4m3."""
    codes = dice.integers(0, 254, (outputs, inputs)).astype(np.uint8)
    return torch.from_numpy(codes + (codes >= 127)).view(torch.float8_e4m3fn)


def float8(
    dice: np.random.Generator, outputs: int, inputs: int, block: tuple[int, int] | None = (128, 128), shape: Any = ()
) -> Packed:
    """With scales of blocks, or of ``shape``: [] or [1] for all, [outputs] or [outputs, 1]."""
    weight = random_float8(dice, outputs, inputs)
    config: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    if block is None:
        scales = random_scales(dice, *shape, dtype=torch.float32)
        per_number = np.broadcast_to(scales.numpy().reshape(-1, 1), (outputs, inputs))
        name = "weight_scale"
    else:
        counts = -(-outputs // block[0]), -(-inputs // block[1])
        scales, name = random_scales(dice, *counts, dtype=torch.float32), "weight_scale_inv"
        per_number = np.repeat(np.repeat(scales.numpy(), block[0], 0)[:outputs], block[1], 1)[:, :inputs]
        config["weight_block_size"] = list(block)
    return Packed({"weight": weight, name: scales}, config, product(per_number, weight.float().numpy()))


def float_quantized(dice: np.random.Generator, outputs: int, inputs: int, strategy: str) -> Packed:
    weight = random_float8(dice, outputs, inputs)
    scales, _ = scales_of(dice, strategy, outputs, inputs, 0, torch.bfloat16)
    per_number = np.broadcast_to(scales.float().numpy().reshape(-1, 1), (outputs, inputs))
    config = compressed("float-quantized", num_bits=8, type="float", strategy=strategy)
    return Packed({"weight": weight, "weight_scale": scales}, config, product(per_number, weight.float().numpy()))


def as_torch(arrays: dict[str, Array]) -> Tensors:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


Make = Callable[[np.random.Generator, int, int], Packed]
CASES: dict[str, Make] = {
    **{f"gptq {bits} of {group}": lambda d, o, i, b=bits, g=group: gptq(d, o, i, b, g)  # type: ignore[misc]
       for bits in (2, 3, 4, 8) for group in (32, 64, 128, -1)},
    **{f"gptq_v2 {bits}": lambda d, o, i, b=bits: gptq(d, o, i, b, 64, "gptq_v2")  # type: ignore[misc]
       for bits in (2, 3, 4, 8)},
    **{f"gptq sym {bits} {form}": lambda d, o, i, b=bits, f=form: gptq(d, o, i, b, 32, f, True)  # type: ignore[misc]
       for bits in (2, 3, 4, 8) for form in ("gptq", "gptq_v2")},
    **{f"awq of {group}": lambda d, o, i, g=group: awq(d, o, i, g) for group in (32, 64, 128, -1)},  # type: ignore[misc]
    "awq sym": lambda d, o, i: awq(d, o, i, 64, zero_point=False),
    **{f"packed {b} {z}": lambda d, o, i, b=b, z=z: pack_quantized(d, o, i, b, 32, z)  # type: ignore[misc]
       for b in (2, 3, 4, 5, 6, 7, 8) for z in ("", "packed", "plain")},
    **{f"packed of {g}": lambda d, o, i, g=g: pack_quantized(d, o, i, 4, g) for g in (64, 128)},  # type: ignore[misc]
    **{f"packed channel {b} {z}": lambda d, o, i, b=b, z=z: pack_quantized(d, o, i, b, 0, z, "channel")  # type: ignore
       for b in (4, 8) for z in ("", "packed", "plain")},
    **{f"int8 {s} {kind}": lambda d, o, i, s=s, k=kind: int_quantized(d, o, i, s, k)  # type: ignore[misc]
       for s in ("tensor", "channel") for kind in (True, False)},
    **{f"int8 group {kind}": lambda d, o, i, k=kind: int_quantized(d, o, i, "group", k, 32)  # type: ignore[misc]
       for kind in (True, False)},
    "fp8 blocks": lambda d, o, i: float8(d, o, i),
    "fp8 blocks of [16, 32]": lambda d, o, i: float8(d, o, i, (16, 32)),
    **{f"fp8 {len(shape)}": lambda d, o, i, s=shape: float8(d, o, i, None, s) for shape in ((), (1,))},  # type: ignore[misc]
    "fp8 channel": lambda d, o, i: float8(d, o, i, None, (o, 1)),
    **{f"float-quantized {s}": lambda d, o, i, s=s: float_quantized(d, o, i, s) for s in ("tensor", "channel")},  # type: ignore[misc]
}  # fmt: skip
"""Formats by name: a random matrix of each."""
