"""Models in GGUF files are the models that they were made of: config, tensors, parts of them, experts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from stages.checkpoint.checkpoint import EMBEDDING, HEAD, Checkpoint, expected
from stages.checkpoint.gguf_weights import GGUFCheckpoint
from stages.checkpoint.opening import open_weights
from stages.checkpoint.spec import ModelSpec
from stages.models.split import Split, SplitWeights
from stages.quantization.matrix import QuantizedMatrix, dense
from tests.models.gguf_files import KINDS, convert
from tests.models.tiny import make_tiny

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 512}
EXPERTS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3MoeForCausalLM": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
                            "norm_topk_prob": True},
}  # fmt: skip


def make(place: Path, architecture: str, **more: Any) -> Path:
    """A tiny model in a directory."""
    if architecture not in EXPERTS:
        return make_tiny(place, architecture, num_hidden_layers=2, **more)
    kind = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 0}
    getattr(transformers, architecture)(kind(**sizes, **heads, **EXPERTS[architecture])).save_pretrained(place)
    return place


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", *EXPERTS])
def test_a_float32_file_is_the_directory(architecture: str, tmp_path: Path) -> None:
    more = {"attention_bias": True, "mlp_bias": True} if architecture == "LlamaForCausalLM" else {}
    model = make(tmp_path / "model", architecture, **more)
    path = convert(model, tmp_path / "model.gguf")
    spec, wanted = ModelSpec.read(path), ModelSpec.read(model)
    assert spec == wanted
    there, here = Checkpoint(model), open_weights(path, spec)
    for name, shape in expected(spec):
        one = there.read([stored := there.stored_name(name)], torch.float32)[stored]
        other = here.read([name], torch.float32)[name]
        assert other.shape == shape and torch.equal(one, other), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("F32", "F16", "BF16")])
def test_parts_of_a_quantised_matrix_are_parts_of_the_whole(kind: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", "LlamaForCausalLM", **WIDE)
    path = convert(model, tmp_path / "model.gguf", kind)
    spec = ModelSpec.read(path)
    weights = GGUFCheckpoint(path, spec)
    for name, shape in expected(spec):
        if len(shape) < 2:
            continue
        whole = weights.matrices([name], torch.float16)[name]
        kept = kind.lower() if shape[1] % KINDS[kind][1] == 0 else "q8_0"
        assert isinstance(whole, QuantizedMatrix) and whole.format == kept
        assert torch.equal(weights.read([name], torch.float32)[name], whole.dense())
        for part in ((slice(3, 21),), (slice(None), slice(32, 64)), (slice(0, 16), slice(7, 61)), (slice(5, 5),)):
            cut = weights.matrices([name], torch.float16, {name: part})[name]
            assert torch.equal(dense(cut), whole.dense()[part]), (name, part)


def test_ranks_of_a_group_read_their_parts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny(tmp_path / "model", "LlamaForCausalLM", **WIDE)
    path = convert(model, tmp_path / "model.gguf", "Q8_0")
    spec = ModelSpec.read(path)
    weights, nbytes, read = GGUFCheckpoint(path, spec), [0, 0], os.preadv
    names = [name for name, shape in expected(spec) if len(shape) == 2 and name != HEAD]
    rank = 0

    def counted(file: int, buffers: Any, offset: int) -> int:
        count = read(file, buffers, offset)
        nbytes[rank] += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    for rank in (0, 1):
        part = SplitWeights(weights, Split(spec, rank, 2))
        for name in names:
            found = dense(part.matrices([name], torch.float16)[name])
            count = nbytes[rank]
            whole = weights.read([name], torch.float32)[name]
            nbytes[rank] = count
            assert torch.equal(found, whole[Split(spec, rank, 2).slices(name)])
    tensors = (path.stat().st_size - 32 * 512) // 1
    assert sum(nbytes) < tensors and abs(nbytes[0] - nbytes[1]) < 0.2 * nbytes[0]


def test_older_files_have_a_tensor_for_each_expert(tmp_path: Path) -> None:
    model = make(tmp_path / "model", "MixtralForCausalLM")

    def split(metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "_exps." in name]:
            kind, shape, data = tensors.pop(name)
            for expert in range(shape[0]):
                size = len(data) // shape[0]
                one = data[expert * size : (expert + 1) * size]
                tensors[name.replace("_exps", "").replace(".weight", f".{expert}.weight")] = kind, shape[1:], one

    paths = convert(model, tmp_path / "new.gguf"), convert(model, tmp_path / "old.gguf", edit=split)
    new, old = (GGUFCheckpoint(path, ModelSpec.read(path)) for path in paths)
    for name, _ in expected(ModelSpec.read(paths[0])):
        assert torch.equal(new.read([name], torch.float32)[name], old.read([name], torch.float32)[name]), name


def test_floats_beside_quantised_matrices_are_exact(tmp_path: Path) -> None:
    def kinds(name: str) -> str:
        return {"embed_tokens": "BF16", "o_proj": "F32", "up_proj": "F16"}.get(name.split(".")[-2], "Q8_0")

    def large(model: Any) -> None:
        model.model.embed_tokens.weight[0, 0] = 1e6  # more than float16 has

    model = make_tiny(tmp_path / "model", "LlamaForCausalLM", edit=large, **WIDE)
    path = convert(model, tmp_path / "model.gguf", kinds)
    spec = ModelSpec.read(path)
    weights = GGUFCheckpoint(path, spec)
    assert spec.dtype == "float16"
    wanted = {"self_attn.o_proj": torch.float32, "mlp.up_proj": torch.float32}
    for name, dtype in wanted.items():
        name = f"model.layers.0.{name}.weight"
        found = weights.matrices([name], torch.float16)[name]
        assert isinstance(found, torch.Tensor) and found.dtype == dtype
    embedding = weights.matrices([EMBEDDING], torch.float16)[EMBEDDING]
    assert isinstance(embedding, torch.Tensor) and embedding.dtype == torch.bfloat16
    assert embedding.isfinite().all() and float(embedding.max()) > 9e5


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_K"])
def test_the_file_says_its_dtype(kind: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path / "model", "LlamaForCausalLM", **WIDE)
    wanted = {"F32": "float32", "BF16": "bfloat16"}.get(kind, "float16")
    assert ModelSpec.read(convert(model, tmp_path / "model.gguf", kind)).dtype == wanted
