"""A GGUF file has the checkpoint's tensors under llama.cpp's names, the rows of q and k in llama.cpp's order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeinfer.bench.gguf_export import export, neighbours
from pipeinfer.core.errors import UserError
from stages.checkpoint.checkpoint import Checkpoint
from stages.checkpoint.gguf_names import gguf_name
from tests.models.tiny import make_tiny

gguf: Any = pytest.importorskip("gguf", reason="the extra peers is not installed")

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 16, 64


def numbers(tensor: Any) -> npt.NDArray[np.float32]:
    """What a reader's tensor holds, as float32 in the checkpoint's shape."""
    shape = [int(size) for size in reversed(tensor.shape)]
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        raw = np.asarray(tensor.data).reshape(-1).view(np.uint16).astype(np.uint32) << 16
        return raw.view(np.float32).reshape(shape)
    return np.asarray(tensor.data, np.float32).reshape(shape)


def as_llama_cpp_has_them(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Row by row: the i-th pair of neighbours in a head is row i of its first half and row i of its second half."""
    found = np.empty_like(weight)
    half = HEAD_DIM // 2
    for head in range(heads):
        for index in range(half):
            found[head * HEAD_DIM + 2 * index] = weight[head * HEAD_DIM + index]
            found[head * HEAD_DIM + 2 * index + 1] = weight[head * HEAD_DIM + half + index]
    return found


@pytest.mark.parametrize("form", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_file_has_the_checkpoint(form: str, tied: bool, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", "LlamaForCausalLM", dtype=torch.bfloat16, tie_word_embeddings=tied)
    read = gguf.GGUFReader(export(model, tmp_path / "model.gguf", form))
    stored = Checkpoint(model)
    wanted = {gguf_name(name): name for name in stored.tensors if not (tied and name == "lm_head.weight")}
    here = {tensor.name: tensor for tensor in read.tensors}
    assert wanted.keys() <= here.keys() and ("output.weight" in here) == ("lm_head.weight" in stored.tensors)
    for name, tensor in here.items():
        source = wanted.get(name, "lm_head.weight")
        weight = stored.read([source], torch.float32)[source].numpy()
        if ".attn_q." in name or ".attn_k." in name:
            weight = as_llama_cpp_has_them(weight, HEADS if ".attn_q." in name else KV_HEADS)
        kind = form if weight.ndim > 1 else "fp32"
        assert tensor.tensor_type.name == {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}[kind]
        precise = weight if kind != "fp16" else weight.astype(np.float16).astype(np.float32)
        assert np.array_equal(numbers(tensor), precise), name


def test_the_file_says_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", "MistralForCausalLM")
    fields = gguf.GGUFReader(export(model, tmp_path / "model.gguf")).fields
    found = {name: field.contents() for name, field in fields.items()}
    assert found["general.architecture"] == "llama" and found["tokenizer.ggml.model"] == "no_vocab"
    sizes = {
        "block_count": 6, "embedding_length": HIDDEN, "feed_forward_length": 112, "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM, "rope.dimension_count": HEAD_DIM,
        "vocab_size": 512, "context_length": 256,
    }  # fmt: skip
    assert {key: found[f"llama.{key}"] for key in sizes} == sizes


def test_rows_within_a_head() -> None:
    rows = torch.arange(8)[:, None]
    assert neighbours(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("architecture", "overrides", "says"),
    [
        ("Qwen2ForCausalLM", {}, "Qwen2ForCausalLM is not exported"),
        ("Qwen3ForCausalLM", {}, "Qwen3ForCausalLM is not exported"),
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            "rotary embedding dynamic",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    architecture: str, overrides: dict[str, Any], says: str, tmp_path: Path
) -> None:
    model = make_tiny(tmp_path / "model", architecture, **overrides)
    with pytest.raises(UserError, match=says):
        export(model, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
