"""The inflated target has as many weights as asked for, all of them at work, and the built-in target's tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeinfer import Engine
from pipeinfer.bench.inflate import LAYERS, inflate, inflated_spec, weight_count
from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.core.errors import UserError
from stages.checkpoint.checkpoint import Checkpoint
from stages.checkpoint.spec import ModelSpec
from tests.models.walk import Reference

ROOT = Path(__file__).resolve().parents[2]
SOURCE = model_directory(BUILTIN, "target")
PROMPTS = ("def read_lines(path):\n", "import os\n", "class Stack:\n    ", "# Return the sum of")
COUNT = 32


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inflate("30M", tmp_path_factory.mktemp("inflated") / "30M")


@pytest.mark.parametrize("size", ["100M", "300M", "0.5B", "1B"])
def test_it_has_as_many_weights_as_asked_for(size: str) -> None:
    asked = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
    assert weight_count(inflated_spec(ModelSpec.read(SOURCE), size)) == pytest.approx(asked, rel=0.01)


def test_the_file_has_them_too(grown: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(grown, local_files_only=True)
    assert model.num_parameters() == pytest.approx(30e6, rel=0.05)
    assert len(model.model.layers) == LAYERS


def test_our_engine_and_transformers_say_what_the_built_in_target_says(grown: Path) -> None:
    with Engine(dtype="fp32") as light, Engine(target=str(grown), dtype="fp32") as engine:
        assert light is not None and engine is not None
        reference = Reference(grown)
        for prompt in PROMPTS:
            wanted = light.generate(prompt, COUNT, ignore_eos=True)
            assert engine.generate(prompt, COUNT, ignore_eos=True).tokens == wanted.tokens
            assert reference.greedy(wanted.prompt_tokens, COUNT) == wanted.tokens


def test_what_is_new_is_work_where_it_may_be_and_nothing_where_it_must_be(grown: Path) -> None:
    spec, stored = ModelSpec.read(grown), ModelSpec.read(SOURCE)
    names = list(Checkpoint(grown).tensors)
    tensors = Checkpoint(grown).read(names, torch.float32)
    for name in names:
        tensor, layer = tensors[name], int(name.split(".")[2]) if ".layers." in name else -1
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            new = tensor if layer >= stored.layer_count else tensor[:, Checkpoint(SOURCE).tensors[name].shape[1] :]
            assert not new.any()
        else:
            assert tensor[-1].abs().min() > 1e-20  # neither zeros nor denormals
    assert spec.intermediate_size > stored.intermediate_size


def test_the_same_size_gives_the_same_files_and_another_place_is_not_overwritten(grown: Path, tmp_path: Path) -> None:
    again = inflate("30M", tmp_path / "again")
    for path in again.iterdir():
        assert path.read_bytes() == (grown / path.name).read_bytes()
    written = (again / "model.safetensors").stat().st_mtime_ns
    assert inflate("30M", again) == again
    assert (again / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="another model"):
        inflate("40M", again)
    with pytest.raises(UserError, match="config.json"):
        inflate("30M", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["again"], "nothing else is left behind"


def test_the_command_says_what_it_wrote_or_why_not(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "pipeinfer.bench.inflate", *arguments]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)

    done = command("20M", str(tmp_path / "it"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "20M weights, 24 layers" in done.stdout
    assert json.loads((tmp_path / "it/config.json").read_text())["num_hidden_layers"] == LAYERS
    for size, problem in (("some", "no size of a model"), ("1M", "too small; use at least 17M")):
        refused = command(size, str(tmp_path / "other"))
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
        assert problem in refused.stderr
