"""Quantised models that run on transformers' own layers: the tokens of the same numbers stored densely."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeinfer.core.errors import CheckpointError
from pipeinfer.placement.roles import split_layers
from stages.checkpoint.checkpoint import Checkpoint
from stages.models import generic
from stages.models.generic import GenericShard
from stages.models.generic_spec import GenericSpec
from tests.models.quantized_models import write
from tests.models.tiny_generic import make_model
from tests.models.walk import NO_KERNELS, Reference, greedy

PROMPTS = ([17, 301, 5, 488, 92, 260, 33], [9, 9, 44, 130])


def dense_copy(source: Path, folder: Path) -> Path:
    """The numbers of ``source`` in float32."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    checkpoint = Checkpoint(source, llama=False)
    tensors = checkpoint.read(checkpoint.quantized.logical(), torch.float32)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return folder


@NO_KERNELS
@pytest.mark.parametrize(("kind", "form"), [("phi3", "gptq-4"), ("gemma2", "fp8-blocks")])
def test_tokens_are_those_of_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, form: str
) -> None:
    target = write(make_model(tmp_path / "source", kind), tmp_path / form, form)
    reference = Reference(dense_copy(target, tmp_path / "dense"))
    wanted = [reference.greedy(prompt, 12) for prompt in PROMPTS]
    spec = GenericSpec.read(target)
    parts = split_layers(spec.layer_count, [1] * 2)
    shards = [GenericShard.load(spec, layers, torch.float32, 64) for layers in parts]
    assert [greedy(shards, prompt, 12) for prompt in PROMPTS] == wanted
    monkeypatch.setattr(generic, "library", lambda: None)
    shards = [GenericShard.load(spec, layers, torch.float32, 64) for layers in parts]
    assert [greedy(shards, prompt, 12) for prompt in PROMPTS] == wanted, "torch alone"


def test_experts_that_transformers_fuses_are_refused(tmp_path: Path) -> None:
    target = write(make_model(tmp_path / "source", "mixtral"), tmp_path / "gptq-4", "gptq-4")
    with pytest.raises(CheckpointError, match="is quantised, and transformers fuses it with others; use a bfl"):
        GenericSpec.read(target)


def test_a_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    target = write(make_model(tmp_path / "source", "phi3"), tmp_path / "awq", "awq")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"]["group_size"] = 32
    (target / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has shape .*, config.json asks for .* .AWQ of 4 bits"):
        GenericSpec.read(target)
