"""A quantised model directory: its tensors are those of the published formats, our reader and others read it, memory is
bounded, and its tokens do not depend on the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeinfer.core.errors import CheckpointError
from pipeinfer.core.ports import Request
from pipeinfer.text import Text
from stages.checkpoint import quantizer
from stages.checkpoint.checkpoint import Checkpoint, expected
from stages.checkpoint.safetensors_file import read_header
from stages.checkpoint.safetensors_writer import SafetensorsWriter
from stages.checkpoint.spec import ModelSpec
from stages.quantization.matrix import QuantizedMatrix
from tests.cli.run import ROOT, here
from tests.models.in_process import POLICIES, decode, pair_of
from tests.models.stored_numbers import fp6_planes, pack_quantized, read_all
from tests.models.tiny import make_tiny

TARGET, DRAFT = ROOT / "pipeinfer/builtin/target", ROOT / "pipeinfer/builtin/draft"
FORMATS = [("int8", 0), ("int8", 32), ("int4", 32), ("int4", 0), ("fp6", 0), ("fp6", 32)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "source"
    sizes = {"num_hidden_layers": 2, "intermediate_size": 96, "tie_word_embeddings": True}
    return make_tiny(folder, "Qwen2ForCausalLM", dtype=torch.bfloat16, **sizes)


def quantized(source: Path, out: Path, format: str, group: int, *more: str) -> Path:
    done = here("quantize", str(source), "--format", format, "--group", str(group), "--out", str(out), *more)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(("format", "group"), FORMATS)
def test_readers_and_definitions_agree(source: Path, tmp_path: Path, format: str, group: int) -> None:
    out = quantized(source, tmp_path / "out", format, group)
    spec, checkpoint = ModelSpec.read(out), Checkpoint(out)
    checkpoint.validate(spec)
    stored, before = read_all(out), read_all(source)
    linears = quantizer.linears(spec)
    for name, _ in expected(spec):
        if name not in before:
            continue  # the head of a tied model
        if name not in linears:
            assert np.array_equal(stored[name], before[name]), name
            continue
        stem = name.removesuffix(".weight")
        wanted = fp6_planes(stored, stem) if format == "fp6" else pack_quantized(stored, stem, int(format[3:]))
        matrix = checkpoint.matrices([name], torch.bfloat16)[name]
        assert isinstance(matrix, QuantizedMatrix) and matrix.format == format
        assert np.array_equal(matrix.dense().numpy(), wanted), name
        part = checkpoint.matrices([name], torch.bfloat16, {name: (slice(3, 17), slice(5, 41))})[name]
        assert isinstance(part, QuantizedMatrix)
        assert np.array_equal(part.dense().numpy(), wanted[3:17, 5:41]), name
        error = np.linalg.norm(wanted - before[name]) / np.linalg.norm(before[name])
        assert error < {"int8": 0.02, "int4": 0.2, "fp6": 0.08}[format]


def test_files_beside_the_weights_are_copied(source: Path, tmp_path: Path) -> None:
    out = quantized(source, tmp_path / "out", "int4", 32)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    asked = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert asked["quant_method"] == "compressed-tensors" and asked["format"] == "pack-quantized"
    weights = asked["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["strategy"]) == (4, 32, "group")


def test_blocks_change_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantized(source, tmp_path / "whole", "fp6", 32)
    monkeypatch.setattr(quantizer, "BLOCK", 500)
    parts = quantized(source, tmp_path / "parts", "fp6", 32)
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


def test_large_models_have_several_files_and_an_index(tmp_path: Path) -> None:
    tensors = {"a": ("F32", (3, 4)), "b": ("U8", (5, 1)), "c": ("I64", (2,)), "d": ("BF16", (20, 3)), "e": ("U8", (1,))}
    content: dict[str, Any] = {
        "a": torch.randn(3, 4),
        "b": torch.arange(5, dtype=torch.uint8)[:, None],
        "c": torch.tensor([7, -7]),
        "d": torch.randn(20, 3).bfloat16(),
        "e": torch.tensor([9], dtype=torch.uint8),
    }
    with SafetensorsWriter(tmp_path, tensors, shard_nbytes=64) as writer:
        for name in ("e", "d", "a", "c", "b"):
            for start in range(0, len(content[name]), 2):
                writer.write(name, content[name][start : start + 2], start)
        writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{number:05}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert index["metadata"]["total_size"] == writer.nbytes == 48 + 5 + 16 + 120 + 1
    for name, file in index["weight_map"].items():
        assert name in read_header(tmp_path / file)
        with safe_open(tmp_path / file, framework="pt") as opened:
            assert torch.equal(opened.get_tensor(name), content[name])


def test_a_sharded_copy_is_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantized(source, tmp_path / "whole", "int8", 32)
    monkeypatch.setattr(SafetensorsWriter.__init__, "__defaults__", (20_000,))
    parts = quantized(source, tmp_path / "parts", "int8", 32)
    assert len(list(parts.glob("model-*.safetensors"))) > 3
    one, other = read_all(whole), read_all(parts)
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
    checkpoint = Checkpoint(parts)
    checkpoint.validate(ModelSpec.read(parts))


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    def damage(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")

    folder = make_tiny(tmp_path / "model", "LlamaForCausalLM", edit=damage, num_hidden_layers=2, intermediate_size=96)
    done = here("quantize", str(folder), "--format", "int4", "--group", "32", "--out", str(tmp_path / "out"))
    assert done.returncode == CheckpointError.exit_code
    assert "model.layers.1.mlp.up_proj.weight cannot be quantised: a weight is not finite" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_tokens_of_a_quantised_model_do_not_depend_on_the_policy(tmp_path: Path) -> None:
    target = quantized(TARGET, tmp_path / "target", "int4", 64)
    pair = pair_of(target, DRAFT, "bf16")
    text = Text(TARGET)
    prompts = [text.encode(prompt) for prompt in ("def mean(values):\n    ", "import os\n\n\nclass")]
    requests = [Request(tuple(prompt), 20) for prompt in prompts]
    answers = {name: [one.tokens for one in decode(pair, POLICIES[name], requests)] for name in ("plain", "continuous")}
    assert answers["plain"] == answers["continuous"] and all(len(tokens) > 8 for tokens in answers["plain"])


def test_damaged_planes_are_refused(source: Path, tmp_path: Path) -> None:
    out = quantized(source, tmp_path / "out", "fp6", 32)
    config, file = json.loads((out / "config.json").read_text()), out / "model.safetensors"
    tensors, stem = load_file(file), "model.layers.1.mlp.down_proj"
    cases = [
        ({"format": "e2m3"}, {}, "format e2m3 is not supported"),
        ({"group_size": 5}, {}, "group_size 5 is not supported"),
        ({"group_size": 64}, {}, "weight_scale"),
        ({}, {"weight_low": None}, "weight_low"),
        ({}, {"weight_high": torch.zeros(64, 47, dtype=torch.uint8)}, "weight_high"),
        ({}, {"weight_low": torch.zeros(64, 24)}, "weight_low"),
        ({}, {"weight_scale": None}, "weight_scale"),
    ]
    for settings, replaced, reason in cases:
        asked = {**config, "quantization_config": config["quantization_config"] | settings}
        (out / "config.json").write_text(json.dumps(asked))
        content = tensors | {f"{stem}.{name}": one for name, one in replaced.items()}
        save_file({name: one for name, one in content.items() if one is not None}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=reason):
            Checkpoint(out).validate(ModelSpec.read(out))
