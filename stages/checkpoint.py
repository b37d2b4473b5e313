"""The weights of a model directory: which tensors there must be, whether they are there, and reading some of them.

Opening and validating parse the safetensors headers here (8 bytes of length, then JSON), so that a damaged download is
refused in milliseconds and before torch is loaded; only ``read`` imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stages.spec import ModelSpec, refuse

if TYPE_CHECKING:
    import torch

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
AGAIN = "download or export the model again"
FLOAT_NBYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_HEADER_NBYTES = 100_000_000  # the format's own limit


def layer_tensors(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's tensors."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.head_count * spec.head_dim, spec.kv_head_count * spec.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, spec.qkv_bias),
        "self_attn.k_proj": (keys, hidden, spec.qkv_bias),
        "self_attn.v_proj": (keys, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, queries, spec.output_bias),
        "mlp.gate_proj": (inner, hidden, spec.mlp_bias),
        "mlp.up_proj": (inner, hidden, spec.mlp_bias),
        "mlp.down_proj": (hidden, inner, spec.mlp_bias),
    }
    prefix = f"model.layers.{layer}."
    tensors: dict[str, tuple[int, ...]] = {
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
    }
    for name, (rows, columns, bias) in linears.items():
        tensors[f"{prefix}{name}.weight"] = (rows, columns)
        if bias:
            tensors[f"{prefix}{name}.bias"] = (rows,)
    if spec.qk_norm:
        tensors[f"{prefix}self_attn.q_norm.weight"] = (spec.head_dim,)
        tensors[f"{prefix}self_attn.k_norm.weight"] = (spec.head_dim,)
    return tensors


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything the model needs; a tied model's head is its embedding."""
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.layer_count):
        tensors.update(layer_tensors(spec, layer))
    tensors[NORM] = (spec.hidden_size,)
    if not spec.tied:
        tensors[HEAD] = (spec.vocab_size, spec.hidden_size)
    return tensors


def shard_tensors(spec: ModelSpec, layers: range) -> list[str]:
    """What the shard of these layers reads: the first also the embedding, the last also the final norm and the head."""
    names = [EMBEDDING] if layers.start == 0 else []
    for layer in layers:
        names.extend(layer_tensors(spec, layer))
    if layers.stop == spec.layer_count:
        names.append(NORM)
        head = EMBEDDING if spec.tied else HEAD
        if head not in names:
            names.append(head)
    return names


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, and what its file says of it; ``dtype`` in safetensors' spelling, as "BF16"."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


class Weights(Protocol):
    """Where a shard gets its tensors from."""

    def stored_name(self, name: str) -> str:
        """The tensor that stands for ``name``, an end of a tied model."""
        ...

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """These tensors and no others, as ``dtype``, in memory of their own. Raises CheckpointError."""
        ...


class Checkpoint:
    """The safetensors files of one model directory, their headers read and their lengths checked.

    Raises CheckpointError for files that are missing, cut short or not safetensors.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.tensors: dict[str, StoredTensor] = {}
        single, index = self.directory / "model.safetensors", self.directory / "model.safetensors.index.json"
        if single.is_file():
            self.tensors = read_header(single)
        elif index.is_file():
            self._read_index(index)
        elif list(self.directory.glob("*.bin")):
            refuse(
                f"{self.directory} holds only pickled weights (*.bin)",
                "convert to safetensors: load it in transformers and save_pretrained it",
            )
        else:
            refuse(f"{single} is missing", "give a directory that holds model.safetensors or its index and shards")

    def _read_index(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            refuse(f"{index} is not a safetensors index ({error!r})", AGAIN)
        headers: dict[str, dict[str, StoredTensor]] = {}
        for file in files:
            path = self.directory / str(file)
            if not path.is_file():
                refuse(f"{path} is missing, but {index.name} names it", AGAIN)
            headers[file] = read_header(path)
        self.tensors = {name: headers[file][name] for name, file in weight_map.items() if name in headers[file]}

    def stored_name(self, name: str) -> str:
        """The tensor that stands for ``name``: where only one of embedding and head is stored, it serves as both.

        Call it for names that tie; like transformers, a tied model that stores a head of its own uses that one."""
        other = {HEAD: EMBEDDING, EMBEDDING: HEAD}.get(name, name)
        return other if name not in self.tensors and other in self.tensors else name

    def validate(self, spec: ModelSpec) -> None:
        """Check that every tensor of the model is there, in shape and in a float type. Raises CheckpointError."""
        for name, shape in expected_tensors(spec).items():
            stored = self.tensors.get(self.stored_name(name) if spec.tied else name)
            if stored is None:
                refuse(f"{self.directory}: tensor {name} {list(shape)} is missing", AGAIN)
            if stored.shape != shape:
                refuse(
                    f"{stored.path}: tensor {name} has shape {list(stored.shape)}, config.json asks for {list(shape)}",
                    "the two are of different models: download both again",
                )
            if stored.dtype not in FLOAT_NBYTES:
                refuse(f"{stored.path}: tensor {name} is {stored.dtype}", f"use one of {', '.join(FLOAT_NBYTES)}")

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Read these tensors and no others, as ``dtype``, in memory of their own. Raises CheckpointError."""
        from safetensors import SafetensorError, safe_open

        by_path: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                refuse(f"{self.directory}: tensor {name} is missing", AGAIN)
            by_path.setdefault(self.tensors[name].path, []).append(name)
        read: dict[str, torch.Tensor] = {}
        for path, wanted in by_path.items():
            try:
                with safe_open(path, framework="pt", device="cpu") as file:
                    for name in wanted:
                        # Without the copy the tensor would stay a window on the mapped file.
                        read[name] = file.get_tensor(name).to(dtype, copy=True)
            except (OSError, SafetensorError) as error:
                refuse(f"{path} cannot be read ({error})", AGAIN)
        return read


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds; raises CheckpointError unless its length is exactly what its header announces."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_NBYTES):
                refuse(f"{path} is cut short or not a safetensors file ({size} bytes)", AGAIN)
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        tensors = {name: _stored(path, entry) for name, entry in entries.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        refuse(f"{path} has a damaged safetensors header ({error!r})", AGAIN)
    if size != end:
        state = "cut short" if size < end else "too long"
        refuse(f"{path} is {state}: {size} bytes, its header announces {end}", AGAIN)
    return tensors


def _stored(path: Path, entry: dict[str, Any]) -> StoredTensor:
    """One header entry; raises ValueError where its extent and its shape contradict each other."""
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
        raise ValueError("negative or fractional extent")
    width = FLOAT_NBYTES.get(entry["dtype"])
    if width is not None and stop - start != width * math.prod(shape):
        raise ValueError(f"{stop - start} bytes for shape {list(shape)}")
    return StoredTensor(path, str(entry["dtype"]), shape)
