"""Tiny random models of many architectures, for the shard that takes any: ``make_model`` writes one of MODELS,
``make_pair`` a target and a draft with a tokenizer. Everything follows from fixed seeds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models.tiny import make_tokenizer

WINDOW = 12  # far shorter than the texts
NOISE = 0.02  # of a draft's weights, in the target's standard deviations
BASE: dict[str, Any] = {"vocab_size": 512, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
SIZES = BASE | {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide, or greedy text soon repeats one token
}
GPT = BASE | {"n_embd": 64, "n_layer": 6, "n_head": 4, "n_positions": 256, "initializer_range": 0.4}
FALCON = BASE | {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "alibi": False,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
}
GEMMA = {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 1, "initializer_range": 0.4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY_EXPERTS = {
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "intermediate_size": 999,  # of layers without experts, which there are not
}
LONG = {"rope_type": "longrope", "long_factor": [4.0] * 8, "short_factor": [1.5] * 8, "rope_theta": 10000.0}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "gpt2-untied-scaled": (
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT | {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 8}),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", GPT | {"rotary_dim": 8}),
    "falcon": ("FalconForCausalLM", "FalconConfig", FALCON),
    "falcon-new": ("FalconForCausalLM", "FalconConfig", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", SIZES | {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SIZES | GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SIZES | GEMMA),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SIZES),
    "phi3-window": ("Phi3ForCausalLM", "Phi3Config", SIZES | {"sliding_window": WINDOW}),
    "phi3-longrope": (
        "Phi3ForCausalLM",
        "Phi3Config",
        SIZES | {"rope_parameters": LONG, "original_max_position_embeddings": 128},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", SIZES | EXPERTS),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", SIZES | MANY_EXPERTS | {"head_dim": 16}),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", SIZES | {"clip_qkv": 2.0}),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", SIZES | {"initializer_range": 0.4}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        BASE
        | {"hidden_size": 64, "ffn_dim": 112, "num_hidden_layers": 6, "num_attention_heads": 4, "init_std": 0.2}
        | {"max_position_embeddings": 256, "word_embed_proj_dim": 32},
    ),
    "cohere": ("CohereForCausalLM", "CohereConfig", SIZES),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", SIZES | EXPERTS | {"head_dim": 16, "sliding_window": WINDOW}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        SIZES
        | EXPERTS
        | {"head_dim": 16, "attention_chunk_size": WINDOW, "intermediate_size_mlp": 96}
        | {"attn_temperature_tuning": False},
    ),
}


def make_model(directory: Path, name: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write a random model without a tokenizer; norms and biases are random too, or errors in them would not show."""
    architecture, config, keys = MODELS[name]
    torch.manual_seed(7)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**(keys | overrides))).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("bias"):
                weight.normal_(0.0, 0.1)
            elif weight.ndim == 1:
                weight.add_(torch.empty_like(weight).uniform_(-0.4, 0.4))
        model.get_input_embeddings().weight.mul_(0.2)  # or a tied model would repeat its last token
    model.to(dtype).save_pretrained(directory, max_shard_size="400KB")
    return directory


def make_pair(directory: Path, name: str, **overrides: Any) -> tuple[Path, Path]:
    """Write a target and a draft, in ``directory``/target and /draft, with a tokenizer of the same 512 tokens.

    The draft is the target with noise on its weights: right now and then, whatever the architecture."""
    target = make_model(directory / "target", name, **overrides)
    architecture, _, _ = MODELS[name]
    model = getattr(transformers, architecture).from_pretrained(target, dtype=torch.float32)
    torch.manual_seed(8)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * weight.std(), alpha=NOISE)
    model.save_pretrained(directory / "draft")
    for part in ("target", "draft"):
        make_tokenizer(directory / part)
    return target, directory / "draft"
