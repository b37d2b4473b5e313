"""Tiny random checkpoints in Hugging Face layout, written by transformers itself, for any test that needs a model.

``make_tiny`` writes one model, ``make_tiny_pair`` a target and a draft that agree now and then; both come with a
byte-level tokenizer of the same 512 tokens. Everything follows from the seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

VOCAB_SIZE = 512
END_OF_TEXT = "<|endoftext|>"  # token 0
CONFIGS = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
}
TEXT = """
The ferry leaves the north pier at seven and again at noon. Nobody on the island owns a car, so the postman walks: first
the harbour, then the school, then the three farms behind the hill. In winter he carries a lantern and two pairs of
gloves. "Letters do not mind the snow," he says, "but I do." The children wait for him by the bakery because he tells
them what the sea was like that morning, and because the baker gives him the broken biscuits to share.

def total(prices, rate=0.2):
    \"\"\"Return the sum of the prices with tax.\"\"\"
    result = 0.0
    for price in prices:
        if price < 0:
            raise ValueError("a price cannot be negative")
        result += price * (1.0 + rate)
    return round(result, 2)

Question: how many legs do four spiders have together? Answer: one spider has eight, so four have thirty-two.
Question: which weighs more, a kilogram of wool or a kilogram of iron? Answer: neither; both weigh a kilogram.
{"name": "lamp", "count": 12, "tags": ["brass", "green"], "price": 49.95}
"""


def make_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE of exactly VOCAB_SIZE tokens: the end of text, 256 bytes, merges learned from TEXT."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, min_frequency=1
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "TEXT is too short for that many merges"
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "model_max_length": 256}
    (directory / "tokenizer_config.json").write_text(json.dumps(described, indent=2))


def tiny_config(architecture: str, **overrides: Any) -> Any:
    """A config of 6 layers, hidden 64, 4 heads on 2 key/value heads; ``overrides`` are config keys."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # wide, or greedy text soon repeats one token
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    if architecture == "MistralForCausalLM":
        sizes["sliding_window"] = None
    return CONFIGS[architecture](**(sizes | overrides))


def make_model(architecture: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model in memory; norms and biases are random too, or an error in them would not show."""
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(tiny_config(architecture, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.6, 1.4)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.2)
    return model


def make_tiny(
    directory: str | Path,
    architecture: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    edit: Callable[[Any], None] | None = None,
    **overrides: Any,
) -> Path:
    """Write a tiny random model and its tokenizer; ``edit`` may change the model first. Returns the directory."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(architecture, seed, **overrides)
    if edit is not None:
        with torch.no_grad():
            edit(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer(folder)
    return folder


def make_tiny_pair(directory: str | Path, architecture: str, seed: int = 0, **overrides: Any) -> tuple[Path, Path]:
    """Write a target and a draft, in ``directory``/target and /draft.

    The draft is the target's first 2 layers with its ends, plus noise; the target's later layers add little, so that
    the draft is right about four times in ten."""
    keep = 2

    def quieten(model: Any) -> None:
        for layer in model.model.layers[keep:]:
            layer.self_attn.o_proj.weight.mul_(0.2)
            layer.mlp.down_proj.weight.mul_(0.2)

    target_dir = make_tiny(Path(directory) / "target", architecture, seed, edit=quieten, **overrides)
    target = getattr(transformers, architecture).from_pretrained(target_dir, dtype=torch.float32)

    def imitate(model: Any) -> None:
        model.load_state_dict(target.state_dict(), strict=False)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)

    draft_dir = make_tiny(
        Path(directory) / "draft", architecture, seed + 1, edit=imitate, **(overrides | {"num_hidden_layers": keep})
    )
    return target_dir, draft_dir
