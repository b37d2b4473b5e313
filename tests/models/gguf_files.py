"""GGUF files of models in Hugging Face layout, written here byte by byte, with whatever may be wrong in one.

``write_gguf`` writes any metadata and tensors. ``convert`` writes a model's file in any type of tensor: floats, Q8_0
and Q4_0 of the model's weights, the other types in random blocks whose numbers are as large as the weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stages.checkpoint.checkpoint import HEAD, Checkpoint, expected
from stages.checkpoint.gguf_file import BLOCKS, NUMBERS
from stages.checkpoint.gguf_names import expert_name, gguf_name
from stages.checkpoint.spec import ModelSpec

KINDS = {name: (number, block, nbytes) for number, (name, block, nbytes) in BLOCKS.items()}
SCALES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
"""Where in a block float16 numbers begin."""
FACTORS = {"Q2_K": 15, "Q3_K": 32, "Q4_K": 63, "Q5_K": 63, "Q6_K": 128}
ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}
Tensor = tuple[int, tuple[int, ...], bytes]
"""Number of the type, shape with the rows first, and data."""


def value(content: Any) -> bytes:
    """A value of the metadata with its type: integers become uint32 or int32, floats float32."""
    if isinstance(content, bool):
        return struct.pack("<I?", 7, content)
    if isinstance(content, int):
        return struct.pack("<Ii", 5, content) if content < 0 else struct.pack("<II", 4, content)
    if isinstance(content, float):
        return struct.pack("<If", 6, content)
    if isinstance(content, str):
        return struct.pack("<I", 8) + text(content)
    if content and isinstance(content[0], str):
        return struct.pack("<IIQ", 9, 8, len(content)) + b"".join(map(text, content))
    kind = 6 if content and isinstance(content[0], float) else 5
    return struct.pack(f"<IIQ{len(content)}{NUMBERS[kind]}", 9, kind, len(content), *content)


def text(content: str) -> bytes:
    data = content.encode()
    return struct.pack("<Q", len(data)) + data


def write_gguf(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], version: int = 3) -> Path:
    """Write a file. A value that is bytes is written as it is."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, content in metadata.items():
        header += text(key) + (content if isinstance(content, bytes) else value(content))
    offset, data = 0, b""
    for name, (number, shape, content) in tensors.items():
        header += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], number, offset)
        padded = content + bytes(-len(content) % 32)
        offset, data = offset + len(padded), data + padded
    path.write_bytes(header + bytes(-len(header) % 32) + data)
    return path


def random_blocks(rng: np.random.Generator, kind: str, rows: int, inputs: int, size: float = 0.0) -> npt.NDArray[Any]:
    """uint8 [rows, bytes] of the type ``kind``: any bits but scales that are not finite; or such that numbers are about
    as large as ``size``."""
    _, block, nbytes = KINDS[kind]
    blocks = rng.integers(0, 256, (rows, inputs // block, nbytes), dtype=np.uint8)
    for at in SCALES[kind]:
        if size:
            most = size / FACTORS.get(kind, 1) / 2 ** (int(kind[1]) - 2)
            scales = rng.uniform(0.5, 1, blocks.shape[:2]) * most * (3 if at == SCALES[kind][-1] and at else 1)
            blocks[:, :, at : at + 2] = scales.astype(np.float16)[..., None].view(np.uint8)
        else:
            blocks[:, :, at + 1] &= 0b10111011
    return blocks.reshape(rows, -1)


def encode(rng: np.random.Generator, weight: torch.Tensor, kind: str) -> bytes:
    """``weight`` in the type ``kind``; see this module."""
    if kind in ("F32", "F16", "BF16"):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        return weight.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    numbers = weight.float().numpy().reshape(-1, weight.shape[-1])
    if kind not in ("Q8_0", "Q4_0"):
        return random_blocks(rng, kind, *numbers.shape, float(numbers.std())).tobytes()
    blocks = numbers.reshape(-1, 32)
    most = 127 if kind == "Q8_0" else 7
    scales = (np.abs(blocks).max(1, keepdims=True) / most).astype(np.float16)
    wide = np.where(scales == 0, 1, scales).astype(np.float32)
    codes = np.clip(np.rint(blocks / wide), -most, most).astype(np.int8)
    packed = codes.view(np.uint8) if kind == "Q8_0" else (codes[:, :16] + 8 | codes[:, 16:] + 8 << 4).astype(np.uint8)
    return np.concatenate((scales.view(np.uint8), packed), 1).tobytes()


def convert(
    model: Path,
    path: Path,
    kind: str | Callable[[str], str] = "F32",
    edit: Callable[[dict[str, Any], dict[str, Tensor]], None] | None = None,
) -> Path:
    """Write the file of the model in the directory ``model``. ``kind``: of matrices, or which one by their names here;
    ``edit`` may change metadata and tensors first."""
    spec, rng, read = ModelSpec.read(model), np.random.default_rng(1), Checkpoint(model)
    metadata, tensors = describe(model, spec), dict[str, Tensor]()
    stacked: dict[str, list[torch.Tensor]] = {}
    for name, shape in expected(spec):
        weight = read.read([stored := read.stored_name(name)], torch.float32)[stored]
        if metadata["general.architecture"] == "llama" and (".q_proj." in name or ".k_proj." in name):
            weight = weight.view(-1, 2, spec.head_dim // 2, *shape[1:]).transpose(1, 2).reshape(shape)
        expert = expert_name(name)
        if expert is not None:
            stacked.setdefault(expert[0], []).append(weight)
        else:
            tensors[gguf_name(name)] = _stored(rng, name, weight, kind)
    for name, weights in stacked.items():
        tensors[name] = _stored(rng, name, torch.stack(weights), kind)
    if edit is not None:
        edit(metadata, tensors)
    return write_gguf(path, metadata, tensors)


def _stored(rng: np.random.Generator, name: str, weight: torch.Tensor, kind: str | Callable[[str], str]) -> Tensor:
    one = "F32" if weight.dim() == 1 else kind if isinstance(kind, str) else kind(name)
    one = next(able for able in (one, "Q8_0", "F16") if weight.shape[-1] % KINDS[able][1] == 0)
    return KINDS[one][0], tuple(weight.shape), encode(rng, weight, one)


def describe(model: Path, spec: ModelSpec) -> dict[str, Any]:
    """Metadata of a model whose tokenizer is GPT-2's kind, or of one without."""
    config = json.loads((model / "config.json").read_text())
    name = ARCHITECTURES.get(config["model_type"], config["model_type"])
    sizes: dict[str, Any] = {
        "context_length": spec.context, "embedding_length": spec.hidden_size, "block_count": spec.layer_count,
        "feed_forward_length": spec.intermediate_size, "attention.head_count": spec.head_count,
        "attention.head_count_kv": spec.kv_head_count, "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim, "rope.freq_base": spec.rope.theta,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
    }  # fmt: skip
    if spec.experts is not None:
        sizes |= {"expert_count": spec.experts.count, "expert_used_count": spec.experts.chosen}
        sizes |= {"expert_feed_forward_length": spec.intermediate_size} if name == "qwen3moe" else {}
    metadata = {"general.architecture": name, "general.alignment": 32}
    metadata |= {f"{name}.{key}": number for key, number in sizes.items()}
    ends = [token for token in spec.eos_tokens if token >= 0]
    metadata |= {"tokenizer.ggml.eos_token_id": ends[0]} if ends else {}
    if not (model / "tokenizer.json").is_file():
        return metadata | {"tokenizer.ggml.model": "no_vocab"}
    return metadata | byte_level(json.loads((model / "tokenizer.json").read_text()), "gpt-2")


def byte_level(read: dict[str, Any], pre: str) -> dict[str, Any]:
    """Metadata of the tokenizer that ``read``, a tokenizer.json, has."""
    tokens = {number: (name, 1) for name, number in read["model"]["vocab"].items()}
    tokens |= {one["id"]: (one["content"], 3 if one["special"] else 4) for one in read["added_tokens"]}
    order = [tokens[number] for number in range(len(tokens))]
    merges = [one if isinstance(one, str) else " ".join(one) for one in read["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": [one for one, _ in order],
        "tokenizer.ggml.token_type": [kind for _, kind in order], "tokenizer.ggml.merges": merges,
    }  # fmt: skip


def untied(model: Path) -> bool:
    """Whether the model has a head of its own."""
    return HEAD in Checkpoint(model).tensors
