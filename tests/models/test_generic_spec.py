"""What the generic shard refuses, by name and before a weight is read; and what it finds out about what it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pipeinfer.core.errors import CheckpointError
from stages.models.generic import GenericShard
from stages.models.generic_spec import GenericSpec
from tests.models.tiny_generic import BASE, EXPERTS, FALCON, SIZES, make_model

GATED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
T5 = {"vocab_size": 512, "d_model": 64, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 4}
SMALL = {"hidden_size": 64, "num_hidden_layers": 3}
NEO = {
    "hidden_size": 64,
    "num_heads": 4,
    "num_layers": 2,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 16,
}
LOCAL = {"head_dim": 16, "sliding_window": 16}
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "encoder-decoder": ("T5ForConditionalGeneration", "T5Config", T5, "is an encoder-decoder"),
    "mamba": ("MambaForCausalLM", "MambaConfig", BASE | SMALL, "recurrent layers"),
    "rwkv": ("RwkvForCausalLM", "RwkvConfig", BASE | SMALL, "recurrent layers"),
    "jamba": ("JambaForCausalLM", "JambaConfig", SIZES | {"use_mamba_kernels": False}, "recurrent layers"),
    "falcon-h1": ("FalconH1ForCausalLM", "FalconH1Config", SIZES, "recurrent layers"),
    "qwen3-next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", SIZES | GATED, "linear_attention layers"),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", SIZES | {"full_attn_idxs": [1, 3]}, "conv layers"),
    "falcon-alibi": ("FalconForCausalLM", "FalconConfig", FALCON | {"alibi": True}, "as for alibi"),
    "bloom": ("BloomForCausalLM", "BloomConfig", BASE | {"hidden_size": 64, "n_layer": 2, "n_head": 4}, "position_ids"),
    "mpt": ("MptForCausalLM", "MptConfig", BASE | {"d_model": 64, "n_layers": 2, "n_heads": 4}, "position_ids"),
    "gpt-neo": ("GPTNeoForCausalLM", "GPTNeoConfig", BASE | NEO, "attention in code of its own"),
    "gemma3-both-ways": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        SIZES | LOCAL | {"use_bidirectional_attention": True},
        "a mask of its own",
    ),
    "gemma4-per-layer": ("Gemma4ForCausalLM", "Gemma4TextConfig", SIZES | LOCAL, "more of the tokens"),
    "llama4-temperature": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        SIZES | EXPERTS | {"head_dim": 16, "intermediate_size_mlp": 96, "attn_temperature_tuning": True},
        "count their slots",
    ),
    "doge": ("DogeForCausalLM", "DogeConfig", SIZES, "under a mask of its own making"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    architecture, config, keys, reason = REFUSED[case]
    getattr(transformers, architecture)(getattr(transformers, config)(**keys)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        GenericSpec.read(tmp_path)
    assert reason in str(caught.value)
    assert architecture in str(caught.value)
    assert "; " in str(caught.value), "what, then the fix"
    assert "\n" not in str(caught.value)


@pytest.fixture
def phi3(tmp_path: Path) -> Path:
    return make_model(tmp_path / "phi3", "phi3")


EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "remote code": ({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}, "never run"),
    "unknown": ({"model_type": "mine"}, "update transformers"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "weights are quantised, and none is"),
    "multimodal": ({"vision_config": {"depth": 2}}, "multimodal"),
    "no architecture": ({"architectures": None}, "architectures is missing"),
    "another head": ({"architectures": ["Phi3ForSequenceClassification"]}, "not a causal language model"),
    "no context": ({"max_position_embeddings": None}, "context|cannot be used"),
    "damaged": ({"hidden_size": "wide"}, "cannot be used|cannot be cut"),
    "a window of nothing": ({"sliding_window": -1}, "sliding_window must be a positive integer, not -1"),
    "kinds of layers": ({"layer_types": 5}, "layer_types must be a list, not 5"),
    "layers without end": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than such a model"),
    "one layer more": ({"num_hidden_layers": 7}, r"tensor model\.layers\.6\.\S+ \[.*\] is missing; download"),
    "wider than memory": ({"hidden_size": 2**31 - 1}, "cannot be used|asks for"),
    "another vocabulary": ({"vocab_size": 640}, r"has shape \[512, 64\], config\.json asks for \[640, 64\]"),
}


@pytest.mark.parametrize("case", list(EDITS))
def test_configs_are_refused(case: str, phi3: Path) -> None:
    edits, reason = EDITS[case]
    path = phi3 / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edits))
    with pytest.raises(CheckpointError, match=reason) as caught:
        GenericSpec.read(phi3)
    assert "\n" not in str(caught.value)


def test_tables_that_no_memory_holds_are_refused(tmp_path: Path) -> None:
    path = make_model(tmp_path, "codegen") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_positions": 10**9}))
    with pytest.raises(CheckpointError, match=r"asks for 4\.8e\+10 numbers beside the weights"):
        GenericSpec.read(tmp_path)


def test_directories_are_refused(phi3: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model directory"):
        GenericSpec.read(tmp_path / "nowhere")
    (phi3 / "model.safetensors.index.json").rename(phi3 / "index")
    with pytest.raises(CheckpointError, match=r"holds parts, but no model\.safetensors\.index\.json"):
        GenericSpec.read(phi3)
    (phi3 / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        GenericSpec.read(phi3)
    (phi3 / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        GenericSpec.read(phi3)


def test_damaged_weights_are_refused(phi3: Path) -> None:
    """The shard that needs a tensor misses it; one that is cut short is noticed before any is loaded."""
    spec = GenericSpec.read(phi3)
    path = next(file for file in phi3.glob("*.safetensors") if "model.norm.weight" in load_file(file))
    tensors = load_file(path)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, path, {"format": "pt"})
    GenericShard.load(spec, range(3), torch.float32, 8)
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is missing"):
        GenericShard.load(spec, range(3, 6), torch.float32, 8)
    save_file(tensors | {"model.norm.weight": norm[:32].clone()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \[32\], config\.json asks for \[64\]"):
        GenericShard.load(spec, range(3, 6), torch.float32, 8)
    save_file(tensors | {"model.norm.weight": norm.to(torch.float8_e4m3fn)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        GenericSpec.read(phi3)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="cut short"):
        GenericSpec.read(phi3)


def test_rows_that_take_their_place_from_their_order_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a model does that takes position_ids and forgets them."""
    directory = make_model(tmp_path, "gpt2")
    base = transformers.GPT2Model
    forward = base.forward

    def forgetful(self: Any, *args: Any, position_ids: object = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(base, "forward", forgetful)
    with pytest.raises(CheckpointError, match="order of rows"):
        GenericSpec.read(directory)


def test_what_is_found_out(tmp_path: Path) -> None:
    gpt2 = GenericSpec.read(make_model(tmp_path / "gpt2", "gpt2"))
    assert (gpt2.architecture, gpt2.layer_count, gpt2.hidden_size, gpt2.vocab_size) == ("GPT2LMHeadModel", 6, 64, 512)
    assert (gpt2.context, gpt2.tied, gpt2.eos_tokens, gpt2.dtype) == (256, True, (0,), "float32")
    assert gpt2.kv_shapes == ((4, 16, 16),) * 6
    assert gpt2.entry == ("transformer.wte", "transformer.wpe")
    assert gpt2.exit == ("transformer.ln_f", "lm_head")
    assert gpt2.exit_numel == 2 * 64 + 512 * 64
    assert 0.6 < gpt2.head_in_layers < 0.7
    mixtral = GenericSpec.read(make_model(tmp_path / "mixtral", "mixtral", torch.bfloat16))
    assert mixtral.dtype == "bfloat16"
    assert mixtral.kv_shapes == ((2, 16, 16),) * 6
    assert mixtral.layer_numel == 64 * 64 * 3 + 4 * 3 * 64 * 112 + 4 * 64 + 2 * 64
    assert EXPERTS["num_local_experts"] == 4
    assert GenericSpec.read(make_model(tmp_path / "falcon", "falcon")).kv_shapes[0] == (1, 16, 16)
    assert GenericSpec.read(make_model(tmp_path / "long", "phi3-longrope")).context == 128, "frequencies change there"


def test_nothing_heavy_is_imported_before_a_directory_is_read() -> None:
    code = "import sys, stages.models.generic_spec; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
