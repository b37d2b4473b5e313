"""Models in the formats of quantised checkpoints: the tokens of plain decoding, and what is refused, in one line.

tests/models/quantized_models.py decodes many prompts with every format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.preflight import clear
from pipeinfer.bench.gguf_export import export
from pipeinfer.core.config import Config
from pipeinfer.core.errors import CheckpointError, UserError
from pipeinfer.core.ports import Request
from stages.checkpoint.checkpoint import EMBEDDING, Checkpoint, dense_tensors, expected_tensors
from stages.checkpoint.spec import ModelSpec
from stages.models.split import Split, SplitWeights
from stages.quantization.matrix import QuantizedMatrix
from tests.cli.run import here
from tests.models.quantized_models import FORMATS, differing, write
from tests.models.tiny import make_tiny, make_tiny_pair
from tests.models.tiny_generic import make_model
from tests.models.walk import NO_KERNELS

MODULE = "model.layers.1.mlp.down_proj"
EXPERTS = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.1.w2.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.1.down_proj.weight",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_tiny_pair(tmp_path_factory.mktemp("pair"), "LlamaForCausalLM", seed=0)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of two layers in each format, written when it is first asked for."""
    work = tmp_path_factory.mktemp("sound")
    source = make_tiny(work / "source", "LlamaForCausalLM", num_hidden_layers=2)
    found: dict[str, Path] = {}
    return lambda form: found.get(form) or found.setdefault(form, write(source, work / form, form))


@NO_KERNELS
@pytest.mark.parametrize("form", ["gptq-4", "awq", "packed-4-zeros", "int8", "fp8-blocks"])
def test_speculation_leaves_the_tokens_as_they_are(tmp_path: Path, pair: tuple[Path, Path], form: str) -> None:
    target = write(pair[0], tmp_path / form, form)
    requests = [Request((17, 301, 5, 488), 16), Request((92, 260, 33), 16)]
    assert not differing(target, pair[1], requests, ["continuous"])


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_read_is_near_what_was_written(sound: Callable[[str], Path], form: str) -> None:
    """Within the width of a step, which tells a wrong order or zero point from rounding."""
    folder = sound(form)
    spec, checkpoint = ModelSpec.read(folder), Checkpoint(folder)
    checkpoint.validate(spec)
    names = list(expected_tensors(spec))
    written = load_file(folder.parent / "source" / "model.safetensors")
    for name, found in checkpoint.read(names, torch.float32).items():
        most = float(written[name].abs().max()) * (0.5 if "-3" in form else 0.2)
        assert float((found - written[name]).abs().max()) <= most, name
        assert found.shape == written[name].shape


def changed(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Let ``change`` change the tensors and the quantisation's configuration of a model."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def says(**fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda tensors, config: config.update(fields)


def weights(**fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    return lambda tensors, config: config["config_groups"]["group_0"]["weights"].update(fields)


def method(**fields: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        config.clear()
        config.update(fields)

    return change


def stored(suffix: str, how: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[..., object]:
    """``how`` changes a tensor of MODULE, or removes it."""

    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        found = how(tensors.pop(f"{MODULE}.{suffix}"))
        if found is not None:
            tensors[f"{MODULE}.{suffix}"] = found.contiguous()

    return change


def added(suffix: str, tensor: torch.Tensor) -> Callable[..., object]:
    return lambda tensors, config: tensors.update({f"{MODULE}.{suffix}": tensor})


def sorted_inputs(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    config["desc_act"] = True
    tensors[f"{MODULE}.g_idx"] = tensors[f"{MODULE}.g_idx"].flip(0)


def unpacked_of(tensors: dict[str, Any]) -> None:
    """Ordinary tensors instead of the quantised ones."""
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        inputs, outputs = len(tensors[name]), tensors[f"{module}.scales"].shape[1]
        tensors[f"{module}.weight"] = torch.zeros(outputs, inputs)
        for suffix in ("qweight", "qzeros", "scales"):
            del tensors[f"{module}.{suffix}"]


# Format -> how it is changed -> a part of what is said before anything is loaded.
EARLY: list[tuple[str, Callable[..., object], str]] = [
    ("gptq-4", method(quant_method="bitsandbytes", load_in_4bit=True), "quantised by bitsandbytes"),
    ("gptq-4", method(load_in_8bit=True), "bitsandbytes are not supported; use the bfloat16 release with `pipeinfer"),
    ("gptq-4", method(bits=4), "quantization_config names no quant_method"),
    *[("gptq-4", method(quant_method=name), f"quantised by {name} are not supported")
      for name in ("hqq", "quanto", "eetq", "aqlm", "mxfp4", "torchao", "higgs", "anything\nelse")],
    ("gptq-4", method(quant_method="gguf"), "name the .gguf file itself"),
    ("gptq-4", says(checkpoint_format="marlin"), "checkpoint_format marlin of GPTQ is not supported; use a release"),
    ("gptq-4", says(is_marlin_format=True), "checkpoint_format marlin"),
    ("gptq-4", says(bits=5), "quantization_config.bits 5 is not supported; use a release of 2 or 3 or 4 or 8 bits"),
    ("gptq-4", says(bits="4"), "quantization_config.bits 4 is not supported"),
    ("gptq-4", says(group_size=48), "group_size 48 is not supported; use groups of a multiple of 32"),
    ("gptq-4", says(pack_dtype="int8"), "pack_dtype int8"),
    ("gptq-4", says(sym="yes"), "sym must be true or false"),
    ("gptq-4", says(dynamic={"+:(": {}}), "damaged regular expression"),
    ("gptq-8", sorted_inputs, "down_proj.g_idx has inputs out of their order (desc_act, act-order)"),
    ("gptq-4", says(group_size=32), "has shape [1, 8], config.json asks for [2, 8]"),
    ("gptq-4", says(bits=8), "has shape [8, 64], config.json asks for [16, 64]"),
    ("gptq-4", stored("qzeros", lambda zeros: None), "down_proj.qzeros is missing (GPTQ of 4 bits)"),
    ("gptq-4", stored("scales", lambda scales: scales.int()), "down_proj.scales is I32; GPTQ of 4 bits"),
    ("gptq-4", stored("qweight", lambda words: words[:-1]), "down_proj.qweight has shape [13, 64], config.json asks"),
    ("awq", says(version="gemv"), "version gemv of AWQ is not supported; use a release of version gemm"),
    ("awq", says(bits=8), "quantization_config.bits 8 is not supported; use a release of 4 bits"),
    ("awq", says(modules_to_not_convert=["mlp"]), "excludes its module (modules_to_not_convert)"),
    ("awq", says(modules_to_not_convert="mlp"), "modules_to_not_convert must be a list of names"),
    ("awq", lambda tensors, config: unpacked_of(tensors), "says that weights are quantised, and none is"),
    ("awq", stored("qweight", lambda words: None), "down_proj.weight [64, 112] is missing"),
    ("packed-4", says(format="nvfp4-pack-quantized"), "format nvfp4-pack-quantized of compressed-tensors is not supp"),
    ("packed-4", says(format="marlin-24"), "format marlin-24"),
    ("packed-4", says(sparsity_config={"format": "sparse-24-bitmask"}), "sparse weights (sparse-24-bitmask)"),
    ("packed-4", says(ignore=["re:.*down_proj"]), "down_proj.weight_packed is packed, but config.json does not say"),
    ("packed-4", says(config_groups=[1]), "config_groups must be an object, not [1]"),
    ("packed-4", weights(actorder="group"), "actorder group of compressed-tensors is not supported"),
    ("packed-4", weights(num_bits=9), "num_bits 9 is not supported"),
    ("packed-4", weights(strategy="token"), "strategy token"),
    ("packed-4", weights(type="float"), "contradicts format pack-quantized"),
    ("packed-4", weights(symmetric=False), "weight_zero_point is missing"),
    ("packed-4", weights(group_size=32), "weight_scale has shape [64, 1], config.json asks for [64, 2]"),
    ("packed-4", added("weight_g_idx", torch.zeros(112)), "inputs out of their order (actorder group)"),
    ("int8", says(format="float-quantized"), "weights.type int contradicts format float-quantized"),
    ("int8", stored("weight", lambda codes: codes.view(torch.uint8)), "down_proj.weight is U8; use one of F32"),
    ("int8", weights(strategy="tensor"), "weight_scale has shape [64, 1], config.json asks for"),
    ("fp8-blocks", says(weight_block_size=[128]), "weight_block_size must be two numbers"),
    ("fp8-blocks", says(weight_block_size=[64, 64]), "config.json asks for [2, 1]"),
    ("fp8-blocks", says(fmt="e5m2"), "fmt e5m2 is not supported; use a release in e4m3"),
    ("fp8-blocks", stored("weight_scale_inv", lambda scales: None), "weight_scale_inv is missing (fp8 (e4m3))"),
    ("fp8-blocks", stored("weight", lambda codes: codes.to(torch.float8_e5m2)), "down_proj.weight is F8_E5M2"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "change", "wanted"), EARLY, ids=[f"{form} {says[:40]}" for form, _, says in EARLY])
def test_refused_before_anything_is_loaded(
    tmp_path: Path, sound: Callable[[str], Path], form: str, change: Callable[..., object], wanted: str
) -> None:
    folder = shutil.copytree(sound(form), tmp_path / "model")
    changed(folder, change)
    with pytest.raises(CheckpointError) as caught:
        clear(Config(str(folder)), 1)
    message = str(caught.value)
    assert wanted.replace("\n", "\\n") in message
    assert message.isprintable() and "; " in message and len(message.replace(str(tmp_path), "")) < 320


INFINITE = torch.tensor(float("inf"))
# The same for what only the numbers tell, when they are read.
LATE: list[tuple[str, Callable[..., object], str]] = [
    ("gptq-4", stored("scales", lambda scales: scales * INFINITE), "down_proj.scales has scales that are not finite"),
    ("gptq-4", stored("qzeros", lambda zeros: zeros + 1), "zero points other than 8, but config.json says sym"),
    ("gptq-8", stored("g_idx", lambda order: order.flip(0)), "g_idx has inputs out of their order (desc_act,"),
    ("awq", stored("scales", lambda scales: scales * torch.nan), "down_proj.scales has scales that are not finite"),
    ("packed-4", stored("weight_shape", lambda shape: shape + 1), "is [65, 113], config.json asks for [64"),
    ("packed-4", stored("weight_scale", lambda scales: scales * INFINITE), "scale has scales that are not finite"),
    ("int8", stored("weight_scale", lambda scales: scales * INFINITE), "weight_scale has scales that are not finite"),
    ("fp8-blocks", stored("weight", lambda codes: codes.float().fill_(torch.nan).to(codes.dtype)), "weight has numbers "
     "that are not finite (NaN)"),
    ("fp8-blocks", stored("weight_scale_inv", lambda scales: scales * INFINITE), "scale_inv has scales that are not"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "change", "wanted"), LATE, ids=[f"{form} {says[:40]}" for form, _, says in LATE])
def test_refused_when_it_is_read(
    tmp_path: Path, sound: Callable[[str], Path], form: str, change: Callable[..., object], wanted: str
) -> None:
    folder = shutil.copytree(sound(form), tmp_path / "model")
    changed(folder, change)
    spec, checkpoint = ModelSpec.read(folder), Checkpoint(folder)
    checkpoint.validate(spec)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.matrices([f"{MODULE}.weight"], torch.bfloat16)
    message = str(caught.value)
    assert wanted in message and "model.safetensors: tensor " in message
    assert message.isprintable() and "; " in message


def test_a_refusal_is_one_line_with_the_exit_code_of_bad_input(tmp_path: Path, sound: Callable[[str], Path]) -> None:
    folder = shutil.copytree(sound("gptq-4"), tmp_path / "model")
    changed(folder, says(checkpoint_format="marlin"))
    result = here("run", "--target", str(folder), "--prompt-tokens", "1,2")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("pipeinfer: ") and "marlin" in result.stderr


def test_old_repositories_say_it_in_a_file_of_its_own(tmp_path: Path, sound: Callable[[str], Path]) -> None:
    for form, name in (("gptq-4", "quantize_config.json"), ("awq", "quant_config.json")):
        folder = shutil.copytree(sound(form), tmp_path / form)
        config = json.loads((folder / "config.json").read_text())
        settings = config.pop("quantization_config")
        del settings["quant_method"]
        if form == "awq":
            settings = {"w_bit": settings["bits"], "q_group_size": settings["group_size"], "zero_point": True}
        else:
            settings["model_file_base_name"] = "gptq_model-4bit-128g"
            (folder / "model.safetensors").rename(folder / "gptq_model-4bit-128g.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        (folder / name).write_text(json.dumps(settings))
        Checkpoint(folder).validate(ModelSpec.read(folder))
        if form == "awq":
            (folder / name).unlink()
            with pytest.raises(CheckpointError, match="is packed, but config.json has no quantization_config"):
                Checkpoint(folder).validate(ModelSpec.read(folder))


def test_modules_may_have_bits_of_their_own(tmp_path: Path, sound: Callable[[str], Path]) -> None:
    """GPTQModel's ``dynamic``, and a module that is not quantised at all."""
    folder = shutil.copytree(sound("gptq-4"), tmp_path / "model")
    other = load_file(sound("gptq-8") / "model.safetensors")
    plain = load_file(sound("gptq-4").parent / "source/model.safetensors")
    name = "model.layers.0.mlp.up_proj"

    def change(tensors: dict[str, Any], config: dict[str, Any]) -> None:
        for key in [key for key in tensors if key.startswith((f"{MODULE}.", f"{name}."))]:
            del tensors[key]
        tensors |= {key: tensor for key, tensor in other.items() if key.startswith(f"{MODULE}.")}
        tensors[f"{name}.weight"] = plain[f"{name}.weight"]
        config["dynamic"] = {r"+:.*\.1\.mlp\.down_proj": {"bits": 8, "group_size": 64, "sym": False}, f"-:{name}": {}}

    changed(folder, change)
    spec, checkpoint = ModelSpec.read(folder), Checkpoint(folder)
    checkpoint.validate(spec)
    read = checkpoint.matrices([f"{MODULE}.weight", f"{name}.weight"], torch.float32)
    assert getattr(read[f"{MODULE}.weight"], "bits", None) == 8
    assert isinstance(read[f"{name}.weight"], torch.Tensor)


@NO_KERNELS
@pytest.mark.parametrize("form", ["gptq-4", "awq", "fp8-blocks"])
def test_embedding_and_head_may_be_quantised(tmp_path: Path, pair: tuple[Path, Path], form: str) -> None:
    for more in ("lm_head", "embed_tokens"):
        target = write(pair[0], tmp_path / more, form, more)
        assert Checkpoint(target).quantized.packing("lm_head.weight" if more == "lm_head" else EMBEDDING) is not None
        assert not differing(target, pair[1], [Request((17, 301, 5, 488), 8)], ["continuous"])


def test_what_is_quantised_is_not_exported(sound: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(UserError, match="quantised weights are not exported to GGUF"):
        export(sound("awq"), tmp_path / "model.gguf")


@NO_KERNELS
@pytest.mark.parametrize(("kind", "form"), [("mixtral", "gptq-4"), ("qwen3_moe", "fp8-blocks")])
def test_experts(tmp_path: Path, kind: str, form: str) -> None:
    target = write(make_model(tmp_path / "source", kind), tmp_path / form, form)
    assert isinstance(Checkpoint(target).matrices([EXPERTS[kind]], torch.bfloat16)[EXPERTS[kind]], QuantizedMatrix)
    assert not differing(target, target, [Request((17, 301, 5, 488), 12)], ["continuous"])


@pytest.mark.parametrize("form", ["gptq-4", "awq", "packed-4-zeros", "int8", "fp8-blocks"])
def test_ranks_of_a_group_read_their_parts(sound: Callable[[str], Path], form: str) -> None:
    folder = sound(form)
    spec, checkpoint = ModelSpec.read(folder), Checkpoint(folder)
    names = [name for name, shape in dense_tensors(spec, 1).items() if len(shape) == 2]
    whole = checkpoint.read(names, torch.float32)
    for rank in range(4):
        split = Split(spec, rank, 4)
        for name, part in SplitWeights(checkpoint, split).matrices(names, torch.bfloat16).items():
            assert isinstance(part, QuantizedMatrix)
            assert torch.equal(part.dense(), whole[name][split.slices(name)]), (rank, name)


@pytest.mark.parametrize(("form", "is_noted"), [("fp8-blocks", True), ("awq", False), ("packed-4", False)])
def test_a_note_says_that_activations_are_not_quantised(
    sound: Callable[[str], Path], form: str, is_noted: bool
) -> None:
    said = f"{sound(form)}: activations are not quantised as config.json says (weights are)"
    assert clear(Config(str(sound(form))), 1, has_kernels=True).note == (said if is_noted else "")
