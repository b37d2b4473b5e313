"""The models: made, stored and loaded with transformers, trained through a compact forward pass of our own."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.pair.plan import Plan, Shape

SPECIAL: Any = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def build_model(shape: Shape, plan: Plan, seed: int) -> Any:
    """Make an untrained Llama model with fp32 weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=plan.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=32,
        max_position_embeddings=plan.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **SPECIAL,
    )
    model: Any = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**SPECIAL, do_sample=False)  # type: ignore[no-untyped-call]
    return model.float()


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embeddings to (batch, heads, length, head_dim) states."""
    left, right = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-right, left), dim=-1) * sin


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention; on a CPU in blocks of 128 rows, measured about twice as fast there as PyTorch's kernel."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    length, block = query.shape[2], 128
    query = query * query.shape[-1] ** -0.5
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        scores = query[:, :, start:stop] @ key[:, :, :stop].transpose(-1, -2)
        mask = torch.full((stop - start, stop), float("-inf"), dtype=scores.dtype).triu(start + 1)
        outputs.append((scores + mask).softmax(dim=-1) @ value[:, :, :stop])
    return torch.cat(outputs, dim=2)


def logits_of(model: Any, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Run the model's own weights through a compact Llama forward pass computed in ``dtype``."""
    config = model.config
    rows, length = ids.shape
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden, eps = config.hidden_size, config.rms_norm_eps
    powers = torch.arange(0, size, 2, device=ids.device, dtype=torch.float32) / size
    angles = torch.outer(torch.arange(length, device=ids.device, dtype=torch.float32), 10000.0**-powers)
    cos, sin = (part.repeat(1, 2).to(dtype) for part in (angles.cos(), angles.sin()))
    embedding = model.model.embed_tokens.weight
    states = F.embedding(ids, embedding).to(dtype)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        normed = F.rms_norm(states, (hidden,), layer.input_layernorm.weight.to(dtype), eps)
        weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        mixed = F.linear(normed, weight.to(dtype)).view(rows, length, heads + 2 * kv_heads, size).transpose(1, 2)
        turned = rotate(mixed[:, : heads + kv_heads], cos, sin)
        key = turned[:, heads:].repeat_interleave(heads // kv_heads, dim=1)
        value = mixed[:, heads + kv_heads :].repeat_interleave(heads // kv_heads, dim=1)
        output = causal_attention(turned[:, :heads], key, value).transpose(1, 2).reshape(rows, length, heads * size)
        states = states + F.linear(output, attention.o_proj.weight.to(dtype))
        normed = F.rms_norm(states, (hidden,), layer.post_attention_layernorm.weight.to(dtype), eps)
        weight = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        gate, up = F.linear(normed, weight.to(dtype)).chunk(2, dim=-1)
        states = states + F.linear(F.silu(gate) * up, mlp.down_proj.weight.to(dtype))
    states = F.rms_norm(states, (hidden,), model.model.norm.weight.to(dtype), eps)
    return F.linear(states, embedding.to(dtype)).float()


@torch.no_grad()
def check_forward(model: Any, ids: torch.Tensor) -> None:
    """Stop when the compact forward pass and the one of transformers differ."""
    gap = float((logits_of(model, ids, torch.float32) - model(input_ids=ids, use_cache=False).logits).abs().max())
    if not gap < 1e-3:
        raise SystemExit(f"the training forward pass disagrees with transformers: logits differ by {gap:.1e}")


def store(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write one model in bf16 with its tokenizer; every file appears under its name only when complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".storing-") as name:
        part = Path(name)
        copy: Any = LlamaForCausalLM(model.config)
        copy.load_state_dict(model.state_dict())
        copy.generation_config = model.generation_config
        copy.to(torch.bfloat16).save_pretrained(part)
        tokenizer.save_pretrained(part)
        for path in (part / "config.json", part / "tokenizer_config.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            for key in ("_name_or_path", "name_or_path", "is_local", "local_files_only"):
                content.pop(key, None)
            if "tokenizer_class" in content:
                content["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every transformers release knows
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in sorted(part.iterdir()):
            path.chmod(0o644)
            path.replace(folder / path.name)


def load(folder: Path, device: torch.device) -> Any:
    """Load a stored model through transformers, upcast to fp32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.to(device).eval()
