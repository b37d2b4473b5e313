"""Whole models in the formats of quantised checkpoints, rounded to nearest, and their tokens under every policy.

    python -m tests.models.quantized_models --prompts 100

For each format the built-in target is written anew, and every prompt is decoded plainly and with speculation: the same
tokens. The test suite takes a few formats and prompts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from pipeinfer.core.ports import Request
from tests.models.in_process import POLICIES, decode, pair_of
from tests.models.packed_tensors import Tensors, compressed

ROOT = Path(__file__).resolve().parents[2]
TARGET, DRAFT = ROOT / "pipeinfer/builtin/target", ROOT / "pipeinfer/builtin/draft"
PROMPTS = ROOT / "benchmarks/prompts/python.jsonl"
Array = npt.NDArray[Any]


def grouped(weight: Array, group: int) -> Array:
    """[outputs, groups, group], with zeros after the last input."""
    return np.pad(weight, ((0, 0), (0, -weight.shape[1] % group))).reshape(len(weight), -1, group)


def rounded(weight: Array, bits: int, group: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Codes [outputs, inputs] from 0 on, and float16 scales and zero points [outputs, groups]."""
    groups, most = grouped(weight, group), 2**bits - 1
    if symmetric:
        scales = np.abs(groups).max(-1) / (2 ** (bits - 1) - 1)
    else:
        scales = (np.maximum(groups.max(-1), 0) - np.minimum(groups.min(-1), 0)) / most
    scales = np.maximum(scales, 1e-4).astype(np.float16).astype(np.float64)
    low = np.minimum(groups.min(-1), 0)
    zeros = np.full(scales.shape, 2.0 ** (bits - 1)) if symmetric else np.clip(np.round(-low / scales), 0, most)
    codes = np.clip(np.round(groups / scales[..., None]) + zeros[..., None], 0, most)
    return codes.reshape(len(weight), -1)[:, : weight.shape[1]].astype(np.int64), scales, zeros.astype(np.int64)


def packed(codes: Array, bits: int, per: int) -> Array:
    """Int32 [rows, words] of codes [rows, any], ``per`` in ``bits`` words where they cross words, else in one."""
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per)))
    each = (codes[..., None] >> np.arange(bits)) & 1
    wide = 32 * bits if per * bits > 32 else 32
    each = each.reshape(len(codes), -1, per * bits)
    each = np.pad(each, ((0, 0), (0, 0), (0, wide - per * bits)))
    return np.packbits(each.reshape(len(codes), -1).astype(np.uint8), axis=-1, bitorder="little").view(np.int32)


def ints(array: Array, dtype: Any = np.int32) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.astype(dtype)))


def as_gptq(weight: Array, bits: int, group: int, form: str, symmetric: bool) -> Tensors:
    size = weight.shape[1] if group == -1 else group
    codes, scales, zeros = rounded(weight, bits, size, symmetric)
    per = 32 if bits == 3 else 32 // bits
    stored = (zeros - (1 if form == "gptq" else 0)) % 2**bits
    return {
        "qweight": ints(packed(codes, bits, per).T),
        "qzeros": ints(packed(stored.T, bits, per)),
        "scales": torch.from_numpy(scales.T.copy()).half(),
        "g_idx": ints(np.arange(weight.shape[1]) // size),
    }


def as_awq(weight: Array, group: int) -> Tensors:
    codes, scales, zeros = rounded(weight, 4, group, symmetric=False)

    def turned(each: Array) -> Array:
        order = np.arange(len(each)).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
        return packed(each.T[:, order], 4, 8)

    kept = torch.from_numpy(scales.T.copy()).half()
    return {"qweight": ints(turned(codes)), "qzeros": ints(turned(zeros)), "scales": kept}


def as_packed(weight: Array, bits: int, group: int, symmetric: bool) -> Tensors:
    codes, scales, zeros = rounded(weight, bits, group, symmetric)
    per = 32 // bits
    more = {} if symmetric else {"weight_zero_point": ints(packed(zeros.T, bits, per).T)}
    return {
        "weight_packed": ints(packed(codes, bits, per)),
        "weight_shape": torch.tensor(weight.shape),
        "weight_scale": torch.from_numpy(scales).half(),
        **more,
    }


def as_int8(weight: Array) -> Tensors:
    codes, scales, _ = rounded(weight, 8, weight.shape[1], symmetric=True)
    return {"weight": ints(codes - 128, np.int8), "weight_scale": torch.from_numpy(scales).float()}


def as_float8(weight: Array, rows: int, columns: int, name: str) -> Tensors:
    high = np.pad(np.abs(weight), ((0, -len(weight) % rows), (0, -weight.shape[1] % columns)))
    high = high.reshape(len(high) // rows, rows, -1, columns).max((1, 3))
    scales = np.maximum(high / 448, 1e-6).astype(np.float32)
    wide = np.repeat(np.repeat(scales, rows, 0)[: len(weight)], columns, 1)[:, : weight.shape[1]]
    return {"weight": torch.from_numpy(weight / wide).float().to(torch.float8_e4m3fn), name: torch.from_numpy(scales)}


Write = tuple[Callable[[Array], Tensors], dict[str, Any]]


def _gptq(bits: int, group: int, form: str = "gptq", sym: bool = True) -> Write:
    config = {"bits": bits, "group_size": group, "sym": sym, "desc_act": False, "checkpoint_format": form}
    return lambda weight: as_gptq(weight, bits, group, form, sym), {"quant_method": "gptq", **config}


def _packed(bits: int, group: int, sym: bool = True) -> Write:
    config = compressed("pack-quantized", num_bits=bits, group_size=group, symmetric=sym, strategy="group")
    return lambda weight: as_packed(weight, bits, group, sym), config


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FORMATS: dict[str, Write] = {
    "gptq-4": _gptq(4, 128),
    "gptq-8": _gptq(8, 64, sym=False),
    "gptq-3": _gptq(3, 32, sym=False),
    "gptq-4-whole": _gptq(4, -1),
    "gptq_v2-4": _gptq(4, 32, "gptq_v2", sym=False),
    "awq": (
        lambda weight: as_awq(weight, 64),
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
    ),
    "packed-4": _packed(4, 128),
    "packed-4-zeros": _packed(4, 32, sym=False),
    "packed-8": _packed(8, 128),
    "int8": (as_int8, compressed("int-quantized", num_bits=8, strategy="channel")),
    "fp8-blocks": (
        lambda weight: as_float8(weight, 128, 128, "weight_scale_inv"),
        {**FP8, "weight_block_size": [128, 128]},
    ),
    "fp8-channel": (
        lambda weight: as_float8(weight, 1, weight.shape[1], "weight_scale"),
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
}
"""How a weight is written, and what config.json says."""


def write(source: Path, folder: Path, form: str, more: str = ".layers.") -> Path:
    """The model ``source`` with its layers' matrices in the format ``form``, and with those in whose names ``more``
    is."""
    write_one, config = FORMATS[form]
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: Tensors = {}
    stored = {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}
    for name, tensor in stored.items():
        if tensor.ndim != 2 or not (".layers." in name or more in name):
            tensors[name] = tensor
            continue
        for suffix, part in write_one(tensor.double().numpy()).items():
            tensors[f"{name.removesuffix('weight')}{suffix}"] = part.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "quantization_config": config}))
    return folder


def prompts(count: int) -> list[tuple[int, ...]]:
    """The last tokens of so many prompts of benchmarks/prompts."""
    from pipeinfer.text import Text

    text = Text(TARGET)
    lines = PROMPTS.read_text().splitlines()
    found = [tuple(text.encode(json.loads(line)["prompt"]))[-24:] for line in lines]
    return [prompt[: len(prompt) - cut] for cut in range(4) for prompt in found][:count]


def differing(target: Path, draft: Path, requests: list[Request], schedules: list[str]) -> list[str]:
    """Prompts whose answers depend on the policy."""
    pair, faults = pair_of(target, draft, "bf16"), []
    wanted = [answer.tokens for answer in decode(pair, POLICIES["plain"], requests)]
    for schedule in schedules:
        found = [answer.tokens for answer in decode(pair, POLICIES[schedule], requests)]
        pairs = enumerate(zip(wanted, found, strict=True))
        faults += [f"{schedule}, prompt {number}" for number, (one, other) in pairs if one != other]
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--schedules", nargs="*", default=["continuous", "rounds", "pipeinfer"])
    given = parser.parse_args()
    for form in given.formats:
        with tempfile.TemporaryDirectory() as folder:
            target = write(TARGET, Path(folder) / form, form)
            requests = [Request(prompt, given.tokens) for prompt in prompts(given.prompts)]
            faults = differing(target, DRAFT, requests, given.schedules)
        print(f"{form}: {given.prompts} prompts, {len(faults)} that differ", *faults[:3], flush=True)


if __name__ == "__main__":
    main()
