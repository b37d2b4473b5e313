"""config.json is read as transformers reads it, and what would not be decoded exactly is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipeinfer.core.errors import CheckpointError
from stages.checkpoint.spec import ModelSpec
from tests.models.tiny import CONFIGS, make_tokenizer, tiny_config

LLAMA, MISTRAL, QWEN2, QWEN3 = CONFIGS
DROP = "(dropped)"


def write(directory: Path, architecture: str = LLAMA, **changes: Any) -> Path:
    """A directory with only a config.json as transformers saves it, then ``changes`` (DROP removes a key)."""
    config = tiny_config(architecture)
    config.architectures = [architecture]
    config.save_pretrained(directory)
    path = directory / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not DROP}))
    return directory


@pytest.mark.parametrize("architecture", list(CONFIGS))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": DROP, "num_attention_heads": 32},
        {"num_key_value_heads": DROP, "num_attention_heads": 32},
        {"rms_norm_eps": DROP, "hidden_act": DROP, "eos_token_id": DROP, "tie_word_embeddings": DROP},
        {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "eos_token_id": [3, 4]},
        {"rope_parameters": DROP},
        {"rope_parameters": DROP, "rope_theta": 500000.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 700.0},
        {"rope_parameters": {"type": "dynamic", "factor": 2.0, "rope_theta": 900.0}, "rope_theta": 700.0},
        {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 3.0}},
        {"eos_token_id": None},
    ],
    ids=str,
)
def test_reads_what_transformers_reads(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    spec = ModelSpec.read(write(tmp_path, architecture, **changes))
    config: Any = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (spec.hidden_size, spec.intermediate_size, spec.vocab_size) == (64, 112, 512)
    assert spec.layer_count == 6 and spec.context == 256
    assert spec.head_count == config.num_attention_heads
    assert spec.kv_head_count == config.num_key_value_heads
    assert spec.head_dim == getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    assert spec.norm_eps == config.rms_norm_eps
    assert spec.tied == config.tie_word_embeddings
    assert spec.rope.kind == config.rope_parameters["rope_type"]
    assert spec.rope.theta == config.rope_parameters["rope_theta"]
    assert spec.rope.factor == config.rope_parameters.get("factor", 1.0)
    eos = config.eos_token_id
    assert spec.eos_tokens == tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])


def test_null_counts_are_derived(tmp_path: Path) -> None:
    spec = ModelSpec.read(write(tmp_path, num_key_value_heads=None, head_dim=None, num_attention_heads=8))
    config: Any = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (spec.kv_head_count, spec.head_dim) == (config.num_key_value_heads, config.head_dim) == (8, 8)


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_biases_and_norms_follow_the_family(tmp_path: Path, architecture: str) -> None:
    """Keys that a family does not know must not add tensors."""
    spec = ModelSpec.read(write(tmp_path, architecture, attention_bias=True, mlp_bias=True))
    assert spec.qkv_bias == (architecture != MISTRAL)
    assert spec.output_bias == (architecture in (LLAMA, QWEN3))
    assert spec.mlp_bias == (architecture == LLAMA)
    assert spec.qk_norm == (architecture == QWEN3)


def test_eos_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    write(tmp_path, eos_token_id=7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert ModelSpec.read(tmp_path).eos_tokens == (5, 6)
    (tmp_path / "generation_config.json").write_text("{}")
    assert ModelSpec.read(tmp_path).eos_tokens == (7,)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        ModelSpec.read(tmp_path)


@pytest.mark.parametrize(("key", "said"), [("dtype", "bfloat16"), ("torch_dtype", "torch.float16"), ("x", None)])
def test_dtype(tmp_path: Path, key: str, said: str | None) -> None:
    changes: dict[str, Any] = {"dtype": DROP, key: said}
    spec = ModelSpec.read(write(tmp_path, **changes))
    assert spec.dtype == (said and said.removeprefix("torch."))
    assert said is None or isinstance(getattr(torch, str(spec.dtype)), torch.dtype)


@pytest.mark.parametrize(
    ("architecture", "changes", "says"),
    [
        (LLAMA, {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported; supported are"),
        (LLAMA, {"architectures": DROP}, "architectures is missing; supported are"),
        (LLAMA, {"model_type": "gemma"}, "model_type gemma is not a LlamaForCausalLM"),
        (LLAMA, {"hidden_size": DROP}, "hidden_size is missing"),
        (LLAMA, {"max_position_embeddings": DROP}, "max_position_embeddings is missing"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        (LLAMA, {"vocab_size": "512"}, "vocab_size must be a positive integer, not '512'"),
        (LLAMA, {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        (LLAMA, {"rms_norm_eps": None}, "rms_norm_eps must be a positive number"),
        (LLAMA, {"head_dim": 15}, "head_dim 15 is odd"),
        (LLAMA, {"head_dim": None, "num_attention_heads": 6}, "hidden_size 64 is no multiple of 6 heads"),
        (LLAMA, {"num_key_value_heads": 3}, "4 heads cannot share 3 key/value heads"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act gelu is not supported; only silu"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp 2 is not supported; set it to 1"),
        (LLAMA, {"per_layer_config": {}}, "per_layer_config is not supported"),
        (LLAMA, {"layer_types": ["linear_attention"] * 6}, "layer_types names linear_attention"),
        (LLAMA, {"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
        (LLAMA, {"rope_parameters": {"rope_type": "longrope"}}, "rope type longrope is not supported; supported are"),
        (LLAMA, {"rope_scaling": {"type": "su"}}, "rope type su is not supported"),
        (LLAMA, {"rope_scaling": ["linear"]}, "must be an object"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor is missing"),
        (LLAMA, {"rope_parameters": {"rope_theta": None}}, "rope_parameters.rope_theta must be a positive number"),
        (LLAMA, {"rope_parameters": {"rope_theta": 1}}, "rope_theta must be above 1"),
        (LLAMA, {"rope_scaling": {"type": "llama3", "factor": 8}}, "rope_scaling.low_freq_factor is missing"),
        (QWEN3, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs by layer type"),
        (LLAMA, {"layer_types": 6}, "layer_types must be a list, not 6"),
        (LLAMA, {"layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers 6"),
        (LLAMA, {"text_config": {}}, "is of a multimodal model (text_config); use a release of its language model"),
        (LLAMA, {"rms_norm_eps": 1}, "rms_norm_eps must be a positive number below 1, not 1"),
        (LLAMA, {"vocab_size": 10**12}, "vocab_size must be a positive integer up to 2147483647, not 1000000000000"),
        (LLAMA, {"rope_theta": 10**400, "rope_parameters": DROP}, "rope_theta must be a positive number, not 1000"),
        (LLAMA, {"eos_token_id": [[1]]}, "eos_token_id must be a token id"),
        (LLAMA, {"hidden_act": ["x"] * 10000}, "hidden_act a list of 10000 is not supported"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window must be a positive integer, not 0"),
        (QWEN2, {"use_sliding_window": True, "layer_types": DROP, "max_window_layers": -1}, "max_window_layers"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, architecture: str, changes: dict[str, Any], says: str) -> None:
    write(tmp_path, architecture, **changes)
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.read(tmp_path)
    message = str(caught.value)
    assert says in message and str(tmp_path) in message and "\n" not in message and "; " in message


@pytest.mark.parametrize(
    ("architecture", "changes", "window"),
    [
        (MISTRAL, {"sliding_window": 256}, 256),
        (MISTRAL, {"sliding_window": None}, None),
        (MISTRAL, {"sliding_window": DROP}, 4096),
        (MISTRAL, {"sliding_window": None, "layer_types": ["sliding_attention"] * 6}, 0),
        (MISTRAL, {"sliding_window": 64, "layer_types": ["full_attention"] * 6}, None),
        (MISTRAL, {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"] * 3}, 64),
        (LLAMA, {"layer_types": ["sliding_attention"] * 6}, 0),
        (QWEN2, {"use_sliding_window": False, "sliding_window": 64}, None),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 64, "layer_types": DROP, "max_window_layers": 6}, None),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 64, "layer_types": DROP, "max_window_layers": 5}, 64),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 64, "layer_types": DROP, "max_window_layers": 0}, 64),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 6}, None),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 6}, 64),
        (QWEN3, {"use_sliding_window": True, "sliding_window": None, "layer_types": ["sliding_attention"] * 6}, 0),
        (QWEN3, {"layer_types": ["sliding_attention"] * 6}, 0),
    ],
)
def test_the_window_is_the_one_in_force(
    tmp_path: Path, architecture: str, changes: dict[str, Any], window: int | None
) -> None:
    assert ModelSpec.read(write(tmp_path, architecture, **changes)).window == window


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model directory; give a local directory"):
        ModelSpec.read(tmp_path / "nowhere")
    make_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json is missing; give a directory"):
        ModelSpec.read(tmp_path)
    for damaged in ("{", "[1]", "\udcff"):
        (tmp_path / "config.json").write_text(damaged, errors="surrogateescape")
        with pytest.raises(CheckpointError, match=r"config\.json"):
            ModelSpec.read(tmp_path)
