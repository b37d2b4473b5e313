"""A damaged or foreign checkpoint is refused from its headers, before torch is loaded."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeinfer.core.errors import CheckpointError
from stages.checkpoint.checkpoint import Checkpoint, expected_tensors, shard_tensors
from stages.checkpoint.spec import ModelSpec
from tests.models.tiny import CONFIGS, make_tiny

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return make_tiny(tmp_path, "Qwen3ForCausalLM", num_hidden_layers=2)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_tiny(tmp_path, "LlamaForCausalLM", max_shard_size="200KB")


def check(directory: Path) -> None:
    Checkpoint(directory).validate(ModelSpec.read(directory))


@pytest.mark.parametrize("architecture", list(CONFIGS))
@pytest.mark.parametrize("tied", [False, True])
def test_expects_exactly_what_transformers_stores(tmp_path: Path, architecture: str, tied: bool) -> None:
    biases: dict[str, Any] = {"attention_bias": True, "mlp_bias": True} if architecture == "LlamaForCausalLM" else {}
    directory = make_tiny(tmp_path, architecture, tie_word_embeddings=tied, **biases)
    check(directory)
    stored = {name: tuple(tensor.shape) for name, tensor in load_file(directory / WHOLE).items()}
    assert expected_tensors(ModelSpec.read(directory)) == stored


def test_shards_partition_the_tensors(single: Path) -> None:
    spec = dataclasses.replace(ModelSpec.read(single), layer_count=5)
    parts = [shard_tensors(spec, layers) for layers in (range(2), range(2, 3), range(3, 5))]
    assert sorted(name for part in parts for name in part) == sorted(expected_tensors(spec))
    assert shard_tensors(spec, range(5)) == list(expected_tensors(spec))
    tied = dataclasses.replace(spec, tied=True)
    assert shard_tensors(tied, range(3, 5))[-2:] == ["model.norm.weight", "model.embed_tokens.weight"]
    assert shard_tensors(tied, range(5)).count("model.embed_tokens.weight") == 1


def test_reads_some_tensors_as_owned_copies(sharded: Path) -> None:
    check(sharded)
    assert (sharded / INDEX).is_file() and not (sharded / WHOLE).exists()
    names = ["model.norm.weight", "model.layers.3.self_attn.q_proj.weight"]
    checkpoint = Checkpoint(sharded)
    read, rounded = checkpoint.read(names, torch.float32), checkpoint.read(names, torch.bfloat16)
    assert set(read) == set(names)
    for name in names:
        stored = load_file(checkpoint.tensors[name].path)[name]
        assert torch.equal(read[name], stored)
        assert torch.equal(rounded[name], stored.to(torch.bfloat16))
    copies = {name: tensor.clone() for name, tensor in read.items()}
    for path in sharded.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(b"\0" * path.stat().st_size)
    assert all(torch.equal(read[name], copies[name]) for name in names), "still windows on the mapped files"
    with pytest.raises(CheckpointError, match="tensor nothing is missing"):
        checkpoint.read(["nothing"], torch.float32)


def cut(path: Path, nbytes: int) -> None:
    path.write_bytes(path.read_bytes()[:nbytes])


def change(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("nbytes", "says"),
    [
        (-1, "is cut short: .* its header announces"),
        (3000, "is cut short|not a safetensors file"),
        (5, "cut short or not a safetensors file"),
        (0, "is empty; download"),
    ],
)
def test_cut_short(single: Path, nbytes: int, says: str) -> None:
    cut(single / WHOLE, nbytes)
    with pytest.raises(CheckpointError, match=says):
        check(single)


def test_shards_missing_or_cut_short(sharded: Path) -> None:
    third = sorted(sharded.glob("model-*.safetensors"))[2]
    cut(third, -4)
    with pytest.raises(CheckpointError, match=f"{third.name} is cut short"):
        check(sharded)
    third.unlink()
    with pytest.raises(CheckpointError, match=f"{third.name} is missing, but {INDEX} names it; download"):
        check(sharded)
    for damaged in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}'):
        (sharded / INDEX).write_text(damaged)
        with pytest.raises(CheckpointError, match="cannot be read as JSON|must hold an object|no index of weights"):
            check(sharded)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {}}',
        b'{"__metadata__": {"a": 1}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": '
        b'{"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}',
        b"[" * 100_000,
    ],
    ids=lambda header: header[:60].decode(),
)
def test_damaged_header(single: Path, header: bytes) -> None:
    (single / WHOLE).write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    with pytest.raises(CheckpointError, match="damaged safetensors header"):
        check(single)


def test_bytes_after_the_end(single: Path) -> None:
    with (single / WHOLE).open("ab") as file:
        file.write(b"!")
    with pytest.raises(CheckpointError, match="is too long"):
        check(single)


def test_tensors_missing_misshapen_or_not_floats(single: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    original = load_file(single / WHOLE)[name]
    change(single / WHOLE, lambda tensors: tensors.pop(name))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=rf"tensor {name} \[64, 112\] is missing; download"):
        check(single)
    change(single / WHOLE, lambda tensors: tensors.update({name: original.T.contiguous()}))
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[112, 64\], config.json asks for \[64, 112\]"):
        check(single)
    change(single / WHOLE, lambda tensors: tensors.update({name: original.to(torch.int8)}))
    with pytest.raises(CheckpointError, match=f"{name} is I8; use one of F32, F16, BF16"):
        check(single)
    change(single / WHOLE, lambda tensors: tensors.update({name: original.to(torch.float16)}))
    check(single)


def test_layers_without_end(single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9, "layer_types": None}))
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.2\.\S+ \[64\] is missing"):
        check(single)


def test_a_larger_vocabulary_in_the_config(single: Path) -> None:
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"vocab_size": 640}))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape \[512, 64\].* asks for \[640, 64\]"):
        check(single)


def test_untied_without_a_head(single: Path) -> None:
    change(single / WHOLE, lambda tensors: tensors.pop("lm_head.weight"))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"tensor lm_head.weight \[512, 64\] is missing"):
        check(single)


def test_nothing_loads_torch_before_reading(single: Path) -> None:
    code = (
        "import sys\nfrom stages.checkpoint.spec import ModelSpec\n"
        "from stages.checkpoint.checkpoint import Checkpoint\n"
        f"Checkpoint({str(single)!r}).validate(ModelSpec.read({str(single)!r}))\n"
        "sys.exit(bool({'torch', 'safetensors', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0
