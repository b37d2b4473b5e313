"""What a GGUF file says of its model, as the config.json of a directory in Hugging Face layout would have it.

So one parser (ModelSpec.read) has all checks and defaults. Numbers that a file stores in float32 are the shortest
decimals that give them, which are those of the config.json that the file was converted from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.checkpoint.folder import AGAIN, plain, printable, refuse, shown
from stages.checkpoint.gguf_file import GGUFFile, LongArray, read_gguf
from stages.checkpoint.gguf_rope import llama3_scaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
}
"""By general.architecture; files of Mistral and Mixtral say llama."""
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
ENDS_OF_TEXT = ("eos", "eot", "eom")
SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
MOST_LAYERS = 1 << 16
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def gguf_config(path: str | Path) -> dict[str, Any]:
    """The config of the model in the GGUF file ``path``. Raises CheckpointError."""
    return config_of(read_gguf(path))


def architecture_name(file: GGUFFile) -> str:
    """transformers' name of the architecture. Raises CheckpointError for another one than of ARCHITECTURES."""
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        able = ", ".join(ARCHITECTURES)
        refuse(f"{file.path}: architecture {plain(name)} is not supported", f"use a GGUF file of {able}")
    if name == "llama" and file.metadata.get("llama.expert_count", 0):
        return "MixtralForCausalLM"
    if name == "llama" and file.metadata.get("llama.attention.sliding_window", 0):
        return "MistralForCausalLM"
    return ARCHITECTURES[str(name)]


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The config of the model in ``file``. Raises CheckpointError for what is missing, or not decoded exactly."""
    architecture = architecture_name(file)
    keys = _Keys(file)
    config: dict[str, Any] = {name: keys.get(key) for name, key in SIZES.items()}
    heads = config["num_attention_heads"]
    embedding = keys.tensor("token_embd.weight", 2)
    head_dim = keys.get("attention.key_length", None) or _divided(keys, config["hidden_size"], heads)
    config |= {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": embedding[0],
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "eos_token_id": list(end_tokens(file)),
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "dtype": stored_type(file),
    }
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            refuse(f"{file.path}: {key} is {shown(keys.get(key))}, of heads of {head_dim}", "use another model")
    if config["hidden_size"] != embedding[1]:
        refuse(f"{file.path}: token_embd.weight has rows of {embedding[1]}, embedding_length says "
               f"{shown(config['hidden_size'])}", AGAIN)  # fmt: skip
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, LongArray) and tokens.count > embedding[0]:
        refuse(f"{file.path}: {tokens.count} tokens, but token_embd.weight has {embedding[0]} rows", AGAIN)
    return config | _mlp(keys, architecture) | _window(keys, architecture) | _rope(keys, config)


class _Keys:
    """The metadata of one architecture, whose name all keys begin with."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self._prefix = file, str(file.metadata["general.architecture"])

    def get(self, key: str, *default: Any) -> Any:
        """A number or a text; one number where an array says the same for each layer. Refused when it is absent without
        a ``default``."""
        name = f"{self._prefix}.{key}"
        if name not in self.file.metadata:
            if not default:
                refuse(f"{self.file.path}: {name} is missing", AGAIN)
            return default[0]
        value = self.file.metadata[name]
        if isinstance(value, LongArray):
            values = set(value.read()) if value.count <= MOST_LAYERS else set()
            if len(values) != 1:
                refuse(f"{self.file.path}: {name} differs by layer", "use a model whose layers are alike")
            return values.pop()
        return value

    def tensor(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor that has to be there."""
        tensor = self.file.tensors.get(name)
        if tensor is None:
            refuse(f"{self.file.path}: tensor {name} is missing", AGAIN)
        if len(tensor.shape) != dims:
            refuse(f"{self.file.path}: tensor {name} has the shape {shown(list(tensor.shape))}", AGAIN)
        return tensor.shape


def _divided(keys: _Keys, hidden_size: object, heads: object) -> int:
    if type(hidden_size) is not int or type(heads) is not int or heads < 1 or hidden_size % heads:
        refuse(f"{keys.file.path}: an embedding of {shown(hidden_size)} for {shown(heads)} heads", AGAIN)
    return hidden_size // heads


def _mlp(keys: _Keys, architecture: str) -> dict[str, Any]:
    width = keys.get("feed_forward_length", None)
    if architecture not in ("MixtralForCausalLM", "Qwen3MoeForCausalLM"):
        return {"intermediate_size": keys.get("feed_forward_length")}
    experts = {"num_experts": keys.get("expert_count"), "num_experts_per_tok": keys.get("expert_used_count")}
    if architecture == "MixtralForCausalLM":
        return {**experts, "intermediate_size": keys.get("feed_forward_length")}
    width = keys.get("expert_feed_forward_length")
    normalised = bool(keys.get("expert_weights_norm", True))  # as llama.cpp takes it where the file does not say
    return {**experts, "moe_intermediate_size": width, "norm_topk_prob": normalised}


def _window(keys: _Keys, architecture: str) -> dict[str, Any]:
    window = keys.get("attention.sliding_window", 0) or None
    return {
        "sliding_window": window,
        "use_sliding_window": window is not None and architecture.startswith("Qwen"),
        "max_window_layers": 0,
    }


def _rope(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling. Raises CheckpointError for a scaling that is none of transformers'."""
    theta, kind = keys.get("rope.freq_base", 10000.0), keys.get("rope.scaling.type", "none")
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0)) or 0
    scaling: dict[str, Any] | None = None
    if keys.get("rope.scaling.attn_factor", 1.0) != 1 or keys.get("rope.scaling.yarn_attn_factor", 1.0) != 1:
        refuse(f"{keys.file.path}: rope.scaling.attn_factor is not supported", "use a model without it")
    if "rope_factors_long.weight" in keys.file.tensors:
        refuse(f"{keys.file.path}: rope scaling longrope is not supported", "use another model")
    if kind == "yarn":
        original = keys.get("rope.scaling.original_context_length", config["max_position_embeddings"])
        scaling = {"factor": factor, "original_max_position_embeddings": original}
        scaling |= {name: keys.get(f"rope.scaling.yarn_{name}", None) for name in ("beta_fast", "beta_slow")}
    elif kind not in ("none", "linear"):
        refuse(f"{keys.file.path}: rope scaling {plain(kind)} is not supported", "only linear, yarn and llama3 are")
    elif factor not in (0, 1):
        kind, scaling = "linear", {"factor": factor}
    if "rope_freqs.weight" in keys.file.tensors:
        if scaling is not None:
            refuse(f"{keys.file.path}: rope_freqs.weight beside rope scaling {plain(kind)}", AGAIN)
        kind = "llama3"
        scaling = llama3_scaling(keys.file, theta, config["head_dim"])
    return {"rope_theta": theta, "rope_scaling": None if scaling is None else {"rope_type": kind, **scaling}}


def end_tokens(file: GGUFFile) -> Iterable[int]:
    """The tokens that end a text or a turn, as the metadata name them."""
    found = []
    for name in ENDS_OF_TEXT:
        token = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is None or token in found:
            continue
        if type(token) is not int:
            refuse(f"{file.path}: tokenizer.ggml.{name}_token_id is {printable(shown(token))}", AGAIN)
        found.append(token)
    return found


def stored_type(file: GGUFFile) -> str:
    """The dtype of what a job adds to the weights, such as its KV slots: that of the matrices where they are not
    quantised, float16 where they are, as llama.cpp has it."""
    sizes = dict.fromkeys(DTYPES, 0)
    for tensor in file.tensors.values():
        if len(tensor.shape) < 2 or "ffn_gate_inp" in tensor.name:
            continue
        if tensor.kind not in sizes:
            return "float16"
        sizes[tensor.kind] += math.prod(tensor.shape)
    return DTYPES[max(sizes, key=lambda kind: sizes[kind])]
