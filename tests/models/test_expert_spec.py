"""Models with experts: config.json is read as transformers reads it, tensors are checked by name and shape, and what
the kernels do not compute goes through transformers' code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from launch.preflight import clear
from pipeinfer.core.config import Config
from pipeinfer.core.errors import CheckpointError, UserError
from pipeinfer.costs.shapes import read_shape
from stages.checkpoint.checkpoint import Checkpoint, expected_tensors, shard_tensors
from stages.checkpoint.random_weights import RandomCheckpoint
from stages.checkpoint.spec import ModelSpec, is_llama_family
from stages.models.generic import GenericShard
from stages.models.generic_spec import GenericSpec
from stages.models.kernel_shard import KernelShard
from stages.models.pair import CheckpointPair, load_llama
from tests.models.tiny_generic import MODELS, make_model, make_pair
from tests.models.walk import NO_KERNELS, Reference, greedy

DROP = "(dropped)"
NAMES = ("mixtral", "qwen3_moe")
EXPERTS = {"mixtral": (4, 2, True, 112), "qwen3_moe": (9, 3, True, 40)}
PROMPT = [17, 301, 5, 488, 92, 260, 33, 410, 7, 151, 64]


def edit(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not DROP}))
    return folder


def write(folder: Path, name: str, **changes: Any) -> Path:
    """A directory with only a config.json as transformers saves it, then ``changes`` (DROP removes a key)."""
    architecture, config, keys = MODELS[name]
    made = getattr(transformers, config)(**keys)
    made.architectures = [architecture]
    made.save_pretrained(folder)
    return edit(folder, **changes)


COUNTS = ("num_local_experts", "num_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict.fromkeys(COUNTS, DROP),
        {"rms_norm_eps": DROP, "eos_token_id": DROP, "rope_parameters": DROP, "tie_word_embeddings": DROP},
        {"head_dim": DROP, "num_key_value_heads": DROP, "num_attention_heads": 32},
        {"num_experts_per_tok": 1, "tie_word_embeddings": True, "rope_parameters": DROP, "rope_theta": 5e5},
    ],
    ids=str,
)
def test_reads_what_transformers_reads(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    spec = ModelSpec.read(write(tmp_path, name, **changes))
    config: Any = transformers.AutoConfig.from_pretrained(tmp_path)
    experts = spec.experts
    assert experts is not None and is_llama_family(tmp_path)
    inner = config.moe_intermediate_size if name == "qwen3_moe" else config.intermediate_size
    told = (config.num_experts, config.num_experts_per_tok, getattr(config, "norm_topk_prob", True), inner)
    assert (experts.count, experts.chosen, experts.is_normalised, spec.intermediate_size) == told
    assert changes or told == EXPERTS[name]
    assert spec.kv_head_count == config.num_key_value_heads and spec.norm_eps == config.rms_norm_eps
    assert spec.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert spec.rope.theta == config.rope_parameters["rope_theta"] and spec.tied == config.tie_word_embeddings
    eos = config.eos_token_id
    assert spec.eos_tokens == tuple([] if eos is None else [eos])
    assert (spec.qk_norm, spec.qkv_bias, spec.mlp_bias) == (name == "qwen3_moe", False, False)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_both_names_of_the_count(key: str, tmp_path: Path) -> None:
    changes = {"num_experts": DROP, "num_local_experts": DROP} | {key: 6}
    spec = ModelSpec.read(write(tmp_path, "qwen3_moe", **changes))
    assert spec.experts is not None
    assert spec.experts.count == transformers.AutoConfig.from_pretrained(tmp_path).num_experts == 6


@pytest.mark.parametrize(
    ("name", "changes", "window"),
    [
        ("mixtral", {}, None),
        ("mixtral", {"sliding_window": 64}, 64),
        ("mixtral", {"sliding_window": 64, "layer_types": ["full_attention"] * 6}, 64),
        ("qwen3_moe", {}, None),
        ("qwen3_moe", {"sliding_window": 64}, None),
        ("qwen3_moe", {"sliding_window": 64, "use_sliding_window": True}, 64),
        ("qwen3_moe", {"sliding_window": DROP, "use_sliding_window": True}, 4096),
        ("qwen3_moe", {"sliding_window": None, "use_sliding_window": True}, None),
    ],
)
def test_windows(name: str, changes: dict[str, Any], window: int | None, tmp_path: Path) -> None:
    assert ModelSpec.read(write(tmp_path, name, **changes)).window == window
    assert transformers.AutoConfig.from_pretrained(tmp_path).sliding_window == window


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("mixtral", {"num_local_experts": 0}, "num_local_experts must be a positive integer, not 0"),
        ("mixtral", {"num_local_experts": 10**6}, "1000000 experts; at most 65536 are supported"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, of 4 experts"),
        ("mixtral", {"intermediate_size": DROP}, "intermediate_size is missing"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob must be true or false, not 1"),
        ("qwen3_moe", {"moe_intermediate_size": -1}, "moe_intermediate_size must be a positive integer"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "some layers have no experts; set mlp_only_layers to []"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "some layers have no experts"),
    ],
)
def test_refused(name: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.read(write(tmp_path, name, **changes))
    message = str(caught.value)
    assert says in message and str(tmp_path) in message and "\n" not in message and "; " in message


@pytest.mark.parametrize("name", NAMES)
def test_expects_exactly_what_transformers_stores(name: str, tmp_path: Path) -> None:
    spec, checkpoint = ModelSpec.read(make_model(tmp_path, name)), Checkpoint(tmp_path)
    checkpoint.validate(spec)
    assert {key: tensor.shape for key, tensor in checkpoint.tensors.items()} == expected_tensors(spec)
    parts = [shard_tensors(spec, layers) for layers in (range(2), range(2, 6))]
    assert sorted(key for part in parts for key in part) == sorted(expected_tensors(spec))


@pytest.mark.parametrize("tensor", ["block_sparse_moe.experts.3.w2.weight", "block_sparse_moe.gate.weight"])
def test_a_tensor_of_experts_that_is_missing_or_unlike(tensor: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path, "mixtral", num_hidden_layers=1, vocab_size=9)
    path, name = folder / "model.safetensors", f"model.layers.0.{tensor}"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor {name} has shape"):
        Checkpoint(folder).validate(ModelSpec.read(folder))
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor {name} .* is missing"):
        Checkpoint(folder).validate(ModelSpec.read(folder))


PLAIN = {"name": "plain", "speculate": False}


def kind(folder: Path, has_kernels: bool = True, **more: Any) -> type:
    """Of the spec that preflight chooses for a model."""
    return type(clear(Config(str(folder), (), PLAIN, **more), 1, has_kernels).target[0])


def test_what_computes_a_model_with_experts(tmp_path: Path) -> None:
    """The kernels, if all ranks have them and no window is in the way and every layer has experts."""
    folder = make_model(tmp_path / "mixtral", "mixtral")
    assert kind(folder) is ModelSpec and kind(folder, has_kernels=False) is GenericSpec
    assert kind(edit(folder, sliding_window=12)) is GenericSpec and kind(folder, context=12) is ModelSpec
    mixed = make_model(tmp_path / "mixed", "qwen3_moe", mlp_only_layers=[1], intermediate_size=48)
    assert not is_llama_family(mixed) and kind(mixed) is GenericSpec
    sparse = make_model(tmp_path / "sparse", "qwen3_moe", decoder_sparse_step=2, intermediate_size=48)
    assert kind(sparse) is GenericSpec and kind(make_model(tmp_path / "whole", "qwen3_moe")) is ModelSpec


def test_drafts_likewise(tmp_path: Path) -> None:
    target, draft = make_pair(tmp_path, "mixtral")
    for has_kernels, spec in ((True, ModelSpec), (False, GenericSpec)):
        cleared = clear(Config(str(target), (str(draft),), {"name": "test"}), 1, has_kernels)
        assert type(cleared.target[0]) is type(cleared.drafts[0][0]) is spec


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mixtral", {}),
        ("qwen3_moe", {"mlp_only_layers": [1], "intermediate_size": 48}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "intermediate_size": 48}),
    ],
    ids=str,
)
def test_tokens_without_the_kernels_for_experts(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path, name, **changes)
    pair = CheckpointPair(clear(Config(str(folder), (), PLAIN), 1, False).target, (), "fp32")
    shard = pair.stage(range(6), 64)
    assert isinstance(shard, GenericShard)
    assert greedy([shard], PROMPT, 24) == Reference(folder).greedy(PROMPT, 24)


def test_without_kernels_there_is_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec.read(write(tmp_path, "mixtral"))
    monkeypatch.setattr("stages.models.pair.library", lambda: None)
    with pytest.raises(UserError, match="MixtralForCausalLM has experts, which need the C kernels; "):
        load_llama(spec, RandomCheckpoint(spec), range(2), torch.float32, 8)
    with pytest.raises(UserError, match="random weights of experts need the C kernels"):
        clear(Config(str(tmp_path), (), forced_acceptance=(0.5,), random_weights=True), 1, False)
    with pytest.raises(UserError, match="shapes have no experts; "):
        read_shape(str(tmp_path))


@NO_KERNELS
@pytest.mark.parametrize("name", NAMES)
def test_random_weights(name: str, tmp_path: Path) -> None:
    spec = ModelSpec.read(write(tmp_path, name))
    cleared = clear(Config(str(tmp_path), (), forced_acceptance=(0.5,), random_weights=True), 1)
    shards = [load_llama(spec, cleared.target[1], layers, torch.bfloat16, 64) for layers in (range(2), range(2, 6))]
    assert all(isinstance(shard, KernelShard) for shard in shards)
    assert len(set(greedy(shards, PROMPT, 20))) > 3
