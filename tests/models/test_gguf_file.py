"""The header of a GGUF file is read whole and checked; what is wrong is said in one line before anything is loaded."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.preflight import clear
from pipeinfer.core.config import Config
from pipeinfer.core.errors import CheckpointError, UserError
from stages.checkpoint.gguf_file import read_gguf, shortest
from stages.checkpoint.gguf_rope import scaled
from stages.checkpoint.gguf_weights import GGUFCheckpoint
from stages.checkpoint.opening import open_weights
from stages.checkpoint.spec import ModelSpec
from stages.models.rope import inverse_frequencies
from tests.models.gguf_files import KINDS, Tensor, convert, value, write_gguf
from tests.models.tiny import make_tiny

Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a directory."""
    return make_tiny(tmp_path_factory.mktemp("gguf") / "model", "LlamaForCausalLM", num_hidden_layers=2)


@pytest.fixture
def file(model: Path, tmp_path: Path) -> Path:
    """Its file, in Q8_0."""
    return convert(model, tmp_path / "model.gguf", "Q8_0")


def refusal(path: Path) -> str:
    """What preflight says of the model in ``path``."""
    with pytest.raises(UserError) as caught:
        clear(Config(target=str(path), drafts=()), 1)
    said = str(caught.value)
    assert "\n" not in said and "; " in said and str(path.parent) in said
    return said


def test_the_file_is_cleared(file: Path) -> None:
    cleared = clear(Config(target=str(file), drafts=()), 1)
    assert cleared.config.dtype == "fp16" and isinstance(cleared.target[1], GGUFCheckpoint)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "is empty"),
    "another format": (lambda data: b"GGJT" + data[4:], "is no GGUF file: it begins with b'GGJT'"),
    "a pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    "version 1": (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "is GGUF version 1; convert the model"),
    "version 9": (lambda data: data[:4] + struct.pack("<I", 9) + data[8:], "is GGUF version 9"),
    "big-endian": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "is a big-endian GGUF file"),
    "six bytes": (lambda data: data[:6], "it ends within its header"),
    "cut in the header": (lambda data: data[:300], "damaged GGUF header"),
    "cut in the data": (lambda data: data[:-40], "is cut short: "),
    "many tensors": (lambda data: data[:8] + struct.pack("<Q", 1 << 50) + data[16:], f"header: {1 << 50} tensors"),
    "many keys": (lambda data: data[:16] + struct.pack("<Q", 1 << 50) + data[24:], f"header: {1 << 50} keys"),
    "a long key": (lambda data: data[:24] + struct.pack("<Q", 1 << 40) + data[32:], f"a key of {1 << 40} bytes"),
    "a long name": (lambda data: data.replace(struct.pack("<Q", 17) + b"token_embd.weight",
                                              struct.pack("<Q", 1 << 62) + b"token_embd.weight"), "tensor's name of"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(DAMAGES))
def test_damaged_files(case: str, file: Path) -> None:
    damage, says = DAMAGES[case]
    file.write_bytes(damage(file.read_bytes()))
    assert says in refusal(file)


def changed(key: str, content: Any) -> Edit:
    def edit(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        metadata[key] = content

    return edit


def dropped(name: str) -> Edit:
    def edit(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        (metadata if name in metadata else tensors).pop(name)  # type: ignore[attr-defined]

    return edit


def shaped(name: str, *shape: int) -> Edit:
    def edit(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = KINDS["F32"][0], shape, bytes(4 * int(torch.Size(shape).numel()))

    return edit


def typed(name: str, number: int) -> Edit:
    def edit(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = number, *tensors[name][1:]

    return edit


def with_scale(name: str, scale: float) -> Edit:
    def edit(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        kind, shape, data = tensors[name]
        tensors[name] = kind, shape, data[:34] + struct.pack("<e", scale) + data[36:]

    return edit


REFUSED: dict[str, tuple[Edit, str]] = {
    "architecture": (changed("general.architecture", "gemma3"), "architecture gemma3 is not supported; use"),
    "no architecture": (dropped("general.architecture"), "architecture None is not supported"),
    "type": (typed("blk.1.ffn_up.weight", 16), "blk.1.ffn_up.weight is IQ2_XXS; use a file of the types F32"),
    "unknown type": (typed("blk.1.ffn_up.weight", 77), "tensor blk.1.ffn_up.weight is of the unknown type 77"),
    "no tensor": (dropped("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight [112, 64] is missing"),
    "no embedding": (dropped("token_embd.weight"), "tensor token_embd.weight is missing"),
    "no key": (dropped("llama.context_length"), "llama.context_length is missing"),
    "shape": (shaped("blk.0.attn_k.weight", 64, 64),
              "tensor blk.0.attn_k.weight has shape [64, 64], the metadata ask for [32, 64]"),
    "dimensions": (shaped("blk.0.attn_k.weight", 2, 16, 64), "has shape [2, 16, 64]"),
    "a quantised vector": (lambda _, tensors: tensors.update({"output_norm.weight": (8, (64,), bytes(68))}),
                           "tensor output_norm.weight is Q8_0, but a vector"),
    "rows": (changed("llama.embedding_length", 128), "token_embd.weight has rows of 64, embedding_length says 128"),
    "heads": (changed("llama.attention.head_count", 0), "num_attention_heads must be a positive integer"),
    "text": (changed("llama.block_count", "two"), "num_hidden_layers must be a positive integer, not 'two'"),
    "layers": (changed("llama.block_count", 2**31 - 1), "tensor blk.2.attn_norm.weight [64] is missing"),
    "heads by layer": (changed("llama.attention.head_count_kv", [2, 4]), "head_count_kv differs by layer"),
    "values": (changed("llama.attention.value_length", 8), "attention.value_length is 8, of heads of 16"),
    "part of a head": (changed("llama.rope.dimension_count", 8), "rope.dimension_count is 8, of heads of 16"),
    "rope": (changed("llama.rope.scaling.type", "longrope"), "rope scaling longrope is not supported"),
    "attention factor": (changed("llama.rope.scaling.attn_factor", 2.0), "attn_factor is not supported"),
    "factors": (lambda _, tensors: tensors.update({"rope_freqs.weight": (0, (8,), struct.pack("<8f", *range(1, 9)))}),
                "the factors in rope_freqs.weight are not of Llama 3's kind"),
    "end": (changed("tokenizer.ggml.eos_token_id", "x"), "eos_token_id is 'x'"),
    "alignment": (changed("general.alignment", 33), "general.alignment is 33"),
    "type of a value": (changed("general.name", struct.pack("<I", 99)), "'general.name' has the type 99"),
    "nested arrays": (changed("general.tags", struct.pack("<IIQ", 9, 9, 1)), "is an array of the type 9"),
    "a long array": (changed("general.tags", struct.pack("<IIQ", 9, 8, 1 << 60)), f"tags' has {1 << 60} values"),
    "long numbers": (changed("general.tags", struct.pack("<IIQ", 9, 6, 1 << 60)), "bytes at"),
    "parts": (changed("split.count", 2), "is one of 2 files"),
    "pre-tokenizer": (changed("tokenizer.ggml.pre", "chatglm-bpe"), "pre-tokenizer chatglm-bpe is not known"),
    "one more": (lambda _, tensors: tensors.update({"blk.0.attn_q_norm.weight": (0, (16,), bytes(64))}),
                 "no LlamaForCausalLM of 2 layers has the tensor blk.0.attn_q_norm.weight"),
    "more layers": (changed("llama.block_count", 1), "no LlamaForCausalLM of 1 layers has the tensor blk.1.attn_norm"),
    "more tokens": (changed("tokenizer.ggml.tokens", ["x"] * 513), "513 tokens, but token_embd.weight has 512 rows"),
    "window": (changed("llama.attention.sliding_window", 16), "window of 16 tokens; ask for less --context"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_files_that_are_refused(case: str, model: Path, tmp_path: Path) -> None:
    edit, says = REFUSED[case]
    assert says in refusal(convert(model, tmp_path / "model.gguf", "Q8_0", edit))


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite(scale: float, model: Path, tmp_path: Path) -> None:
    path = convert(model, tmp_path / "model.gguf", "Q8_0", with_scale("blk.0.ffn_up.weight", scale))
    weights = open_weights(path, ModelSpec.read(path))
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_up.weight \(Q8_0\) cannot be used: .*row 0 is not finite"):
        weights.matrices(["model.layers.0.mlp.up_proj.weight"], torch.float16)


def test_a_file_that_changes_while_it_is_read(file: Path) -> None:
    weights = open_weights(file, ModelSpec.read(file))
    file.write_bytes(file.read_bytes()[:-5000])
    for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
        with pytest.raises(CheckpointError, match="was changed before it was read|ends at byte"):
            weights.read([name], torch.float32)
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        weights.read(["model.norm.weight"], torch.float32)


def test_twice(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    assert "tensor blk.0.ffn_up.weight comes twice" in refusal(file)
    file.write_bytes(data.replace(b"llama.block_count", b"general.alignment"))
    assert "'general.alignment' comes twice" in refusal(file)


def in_parts(model: Path, folder: Path, count: int = 3) -> list[Path]:
    """The model's file in parts, as llama.cpp's gguf-split writes them."""
    parts: list[tuple[dict[str, Any], dict[str, Tensor]]] = []

    def edit(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        names = list(tensors)
        about = {"split.count": count, "split.tensors.count": len(names)}
        for part in range(count):
            here = {name: tensors[name] for name in names[part::count]}
            parts.append(((metadata if part == 0 else {}) | about | {"split.no": part}, here))

    convert(model, folder / "whole.gguf", "Q8_0", edit)
    names = [folder / f"model-{part + 1:05}-of-{count:05}.gguf" for part in range(count)]
    return [write_gguf(name, *part) for name, part in zip(names, parts, strict=True)]


def test_several_files_are_one_model(model: Path, file: Path, tmp_path: Path) -> None:
    first, second, third = in_parts(model, tmp_path)
    spec = ModelSpec.read(first)
    assert spec == ModelSpec.read(file)
    whole, parts = open_weights(file, spec), open_weights(first, spec)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        assert torch.equal(whole.read([name], torch.float32)[name], parts.read([name], torch.float32)[name])
    assert f"is not the first of 3 files; give {tmp_path}/model-00001-of-00003.gguf" in refusal(second)
    shutil.copy(second, third)
    assert "is in another file, too" in refusal(first)
    third.unlink()
    assert "model-00003-of-00003.gguf is missing, one of 3 files" in refusal(first)
    shutil.copy(first, tmp_path / "renamed.gguf")
    assert "is one of 3 files; name them as they were" in refusal(tmp_path / "renamed.gguf")


def test_long_arrays_stay_in_the_file(file: Path) -> None:
    read = read_gguf(file)
    assert len(read.values("tokenizer.ggml.tokens") or []) == 512 and read.values("nothing") is None
    assert "tokens" not in repr(read) and len(str(read.metadata)) < 6000


@pytest.mark.parametrize("number", [1e-05, 1e-06, 5e5, 1e6, 10000.0, 0.1, 8.0, 1e30, 0.0, -2.5, 1 / 3])
def test_numbers_are_the_shortest_that_are_stored(number: float) -> None:
    stored = struct.unpack("<f", value(number)[4:])[0]
    assert struct.pack("<f", shortest(stored)) == struct.pack("<f", number)
    assert shortest(stored) == float(f"{number:.8g}") or number == 1 / 3


@pytest.mark.parametrize(("factor", "context"), [(8.0, 8192), (32.0, 8192), (4.0, 64)])
def test_llama3_rope_is_found_again(factor: float, context: int, model: Path, tmp_path: Path) -> None:
    low, high = 1.0, 4.0
    numbers = torch.tensor(scaled(500000.0, 16, factor, context, low, high))

    def edit(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        metadata["llama.rope.freq_base"] = 500000.0
        tensors["rope_freqs.weight"] = 0, (8,), numbers.numpy().tobytes()

    rope = ModelSpec.read(convert(model, tmp_path / "model.gguf", "Q8_0", edit)).rope
    assert (rope.kind, rope.theta, rope.factor) == ("llama3", 500000.0, factor)
    assert (rope.original_context, rope.low_freq_factor, rope.high_freq_factor) == (context, low, high)
    frequencies, _ = inverse_frequencies(rope, 16, 256)
    periods = 500000.0 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)
    torch.testing.assert_close(frequencies, 1 / periods / numbers, rtol=1e-5, atol=0)


def test_linear_and_yarn_rope(model: Path, tmp_path: Path) -> None:
    def edit(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}

    rope = ModelSpec.read(convert(model, tmp_path / "linear.gguf", edit=edit)).rope
    assert (rope.kind, rope.factor) == ("linear", 4.0)

    def yarn(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        edit(metadata, tensors)
        metadata |= {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 64}

    rope = ModelSpec.read(convert(model, tmp_path / "yarn.gguf", edit=yarn)).rope
    assert (rope.kind, rope.factor, rope.original_context) == ("yarn", 4.0, 64)
