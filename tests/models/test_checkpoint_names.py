"""Checkpoints are read by the names and from the formats in which people save them, or refused for the true reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeinfer.core.errors import CheckpointError
from stages.checkpoint.checkpoint import Checkpoint, expected_tensors
from stages.checkpoint.spec import ModelSpec
from stages.models.generic import GenericShard
from stages.models.generic_spec import GenericSpec
from tests.models import tiny_generic
from tests.models.tiny import make_tiny
from tests.models.walk import Reference, greedy

WHOLE, PICKLED = "model.safetensors", "pytorch_model.bin"
PROMPT = [17, 301, 5, 488, 92, 260, 33]
Rename = Callable[[str], str]
NAMES: dict[str, Rename] = {
    "the base model alone": lambda name: name.removeprefix("model."),
    "data parallel": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"_orig_mod.module.{name}",
    "both, the other way round, twice": lambda name: f"module.module._orig_mod.{name}",
    "compiled layers": lambda name: re.sub(r"layers\.(\d+)\.", r"layers.\1._orig_mod.", name),
    "the base model alone, compiled": lambda name: f"_orig_mod.{name.removeprefix('model.')}",
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rewrite(folder: Path, rename: Rename, pickled: bool = False, parts: int = 1) -> dict[str, torch.Tensor]:
    """Store a model's tensors again, by other names and in so many files; returns them by the names they had."""
    tensors = tensors_of(folder)
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    single = PICKLED if pickled else WHOLE
    stem, suffix = single.split(".")
    weight_map = {}
    for part in range(parts):
        file = single if parts == 1 else f"{stem}-{part + 1:05}-of-{parts:05}.{suffix}"
        some = dict(list(renamed.items())[part::parts])
        weight_map |= dict.fromkeys(some, file)
        torch.save(some, folder / file) if pickled else save_file(some, folder / file, {"format": "pt"})
    if parts > 1:
        (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "llama", "LlamaForCausalLM", num_hidden_layers=2)


def check(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    checkpoint.validate(ModelSpec.read(folder))
    return checkpoint


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("names", list(NAMES))
def test_llama_names(llama: Path, names: str, parts: int, pickled: bool) -> None:
    tensors = rewrite(llama, NAMES[names], pickled, parts)
    read = check(llama).read(expected_tensors(ModelSpec.read(llama)), torch.float32)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in read)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("names", [*NAMES, "as on the hub"])
def test_gpt2_names(tmp_path: Path, names: str, pickled: bool) -> None:
    """Each shard reads its own tensors; buffers of older transformers are no tensors of the model."""
    folder = tiny_generic.make_model(tmp_path, "gpt2", n_layer=2)
    expected = Reference(folder).greedy(PROMPT, 8)
    rename = NAMES.get(names, str)
    rewrite(folder, lambda name: rename(name.removeprefix("transformer.") if "hub" in names else name), pickled)
    if not pickled and "hub" in names:
        masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 256, 256, dtype=torch.uint8) for layer in range(2)}
        save_file(load_file(folder / WHOLE) | masks, folder / WHOLE, {"format": "pt"})
    spec = GenericSpec.read(folder)
    shards: Any = [GenericShard.load(spec, range(layer, layer + 1), torch.float32, 32) for layer in range(2)]
    assert greedy(shards, PROMPT, 8) == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_two_names_for_one_tensor_are_refused(tmp_path: Path, kind: str) -> None:
    if kind == "llama":
        folder = make_tiny(tmp_path, "LlamaForCausalLM", num_hidden_layers=2)
        pairs = [("model.norm.weight", "norm.weight"), ("lm_head.weight", "module.lm_head.weight")]
    else:
        folder, wte = tiny_generic.make_model(tmp_path, "gpt2"), "transformer.wte.weight"
        pairs = [(wte, "wte.weight"), (wte, f"_orig_mod.{wte}")]
    tensors = tensors_of(folder)
    for path in folder.glob("*.index.json"):
        path.unlink()
    for known, other in pairs:
        save_file(tensors | {other: tensors[known].clone()}, folder / WHOLE, {"format": "pt"})
        with pytest.raises(CheckpointError, match="both mean") as caught:
            GenericSpec.read(folder) if kind == "gpt2" else check(folder)
        assert known in str(caught.value) and other in str(caught.value)


def test_safetensors_come_before_pickles(llama: Path) -> None:
    (llama / PICKLED).write_bytes(b"nothing")
    assert check(llama).tensors["lm_head.weight"].path.name == WHOLE


class Code:
    """Pickles as a call of a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code was run",)


PICKLES: dict[str, tuple[Callable[[dict[str, torch.Tensor], Path], object], str]] = {
    "code": (lambda all_, path: torch.save({"a": Code()}, path), r"needs code to be unpickled .*print.*; convert"),
    "in a program's own dictionary": (
        lambda all_, path: torch.save({"state_dict": all_}, path),
        r"'state_dict' is a dict and not a tensor; save the model's state_dict\(\) alone",
    ),
    "a list": (lambda all_, path: torch.save([1], path), "holds a list instead of tensors"),
    "before torch 1.6": (
        lambda all_, path: torch.save(all_, path, _use_new_zipfile_serialization=False),
        "not of the format that torch writes since version 1.6; convert to safetensors",
    ),
    "text": (lambda all_, path: path.write_text("hello"), "not of the format that torch writes"),
    "cut short": (
        lambda all_, path: (torch.save(all_, path), path.write_bytes(path.read_bytes()[:-500])),
        "cut short or damaged .*; download",
    ),
    "another shape": (
        lambda all_, path: torch.save(all_ | {"lm_head.weight": torch.zeros(3, 4)}, path),
        r"lm_head\.weight has shape \[3, 4\], config\.json asks for \[512, 64\]",
    ),
    "whole numbers": (
        lambda all_, path: torch.save(all_ | {"model.norm.weight": torch.ones(64, dtype=torch.int64)}, path),
        r"norm\.weight is I64; use one of F32",
    ),
    "a huge view": (
        lambda all_, path: torch.save(all_ | {"model.norm.weight": torch.zeros(1).expand(1 << 40)}, path),
        r"has shape \[1099511627776\]",
    ),
    "empty": (lambda all_, path: path.write_bytes(b""), "is empty; download"),
}


@pytest.mark.parametrize("case", list(PICKLES))
def test_pickles_that_are_not_weights(llama: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    write, says = PICKLES[case]
    tensors = rewrite(llama, str, pickled=True)
    write(tensors, llama / PICKLED)
    with pytest.raises(CheckpointError, match=says) as caught:
        check(llama)
    assert "\n" not in str(caught.value)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("adapter_model.safetensors", "only a LoRA adapter .*; merge it"),
        ("model-Q4_K_M.gguf", "a GGUF file .*; give the path of that file"),
        ("model.onnx", "an ONNX model"),
        ("consolidated.00.pth", r"its authors' own format \(consolidated"),
        ("tf_model.h5", "weights for TensorFlow"),
        ("model-00001-of-00002.safetensors", r"parts, but no model\.safetensors\.index\.json .*; download the index"),
        ("pytorch_model-00001-of-00002.bin", r"parts, but no pytorch_model\.bin\.index\.json"),
        ("model.fp16.safetensors", "safetensors under another name"),
        ("notes.txt", r"model\.safetensors is missing; give a directory"),
    ],
)
def test_other_formats_are_named(llama: Path, file: str, says: str) -> None:
    (llama / WHOLE).rename(llama / file)
    with pytest.raises(CheckpointError, match=says):
        check(llama)
    (llama / "config.json").unlink()
    foreign = not any(word in says for word in ("parts", "another name", "missing"))
    with pytest.raises(CheckpointError, match=says if foreign else r"config\.json is missing"):
        ModelSpec.read(llama)


def test_a_tied_model_with_a_head_of_another_height(tmp_path: Path) -> None:
    folder = make_tiny(tmp_path, "Qwen2ForCausalLM", num_hidden_layers=2, tie_word_embeddings=True)
    save_file(load_file(folder / WHOLE) | {"lm_head.weight": torch.zeros(640, 64)}, folder / WHOLE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[640, 64\], .* asks for \[512, 64\]"):
        check(folder)


def test_a_git_lfs_pointer_is_called_one(llama: Path) -> None:
    (llama / WHOLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer and not the file itself; fetch it with git lfs pull"):
        check(llama)
