"""The product: on any number of ranks, under any policy and with either MPI, the tokens are those of transformers.

Greedy, fp32, at least 20 prompts of 128 new tokens for the built-in pair and for a random pair of every architecture.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from launch.mpiexec import command
from pipeinfer.config import BUILTIN, model_directory
from pipeinfer.text import Text
from tests.models.tiny import make_tiny_pair

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ["-m", "tests.mpi.programs.same_tokens"]
NEW_TOKENS = 128
ARCHITECTURES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    found = {"builtin": [BUILTIN, BUILTIN]}
    for architecture in ARCHITECTURES:
        pair = make_tiny_pair(tmp_path_factory.mktemp(architecture), architecture, seed=1)
        found[architecture] = [str(directory) for directory in pair]
    return found


def prompts_for(target: str, count: int) -> list[list[int]]:
    lines = (ROOT / "benchmarks/prompts/python.jsonl").read_text().splitlines()[:count]
    text = Text(model_directory(target, "target"))
    return [text.encode(json.loads(line)["prompt"])[:60] for line in lines]


def decode(
    python: str, directory: Path, models: dict[str, list[str]], sizes: list[int], count: int
) -> tuple[dict[str, list[list[int]]], dict[str, list[list[int]]]]:
    """The prompts of each model, and the tokens of each (model, policy, size)."""
    prompts = {name: prompts_for(target, count) for name, (target, _) in models.items()}
    order, answers = directory / "order.json", directory / "answers.json"
    words = {"models": models, "prompts": prompts, "sizes": sizes, "new_tokens": NEW_TOKENS, "answers": str(answers)}
    order.write_text(json.dumps(words))
    line, environ = command(max(sizes), [python, *PROGRAM, str(order)], python)
    environ["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=540, check=False)
    assert result.returncode == 0, result.stderr
    return prompts, json.loads(answers.read_text())


def reference(target: str, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers' greedy generate says."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(model_directory(target, "target"), dtype=torch.float32)
    model.generation_config.eos_token_id = None
    found = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def test_every_rank_count_and_policy_says_what_transformers_says(models: dict[str, list[str]], tmp_path: Path) -> None:
    prompts, answers = decode(sys.executable, tmp_path, models, [2, 3, 4, 6], 20)
    assert len(answers) == 5 * len(models)
    for name, (target, _) in models.items():
        expected = reference(target, prompts[name])
        assert all(len(tokens) == NEW_TOKENS for tokens in expected)
        for key, found in answers.items():
            if key.startswith(f"{name} "):
                assert found == expected, key


@pytest.fixture(scope="module")
def mpich_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with the packages of this one, but with MPICH as its MPI."""
    place = tmp_path_factory.mktemp("mpich")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True, timeout=60)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place)}))
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed", "--prefix", str(place)]
    got = subprocess.run(
        [*install, "-c", str(ROOT / "constraints.txt"), "mpich"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if got.returncode:
        pytest.skip(f"the mpich wheel cannot be had here: {got.stderr.strip().splitlines()[-1]}")
    return str(place / "bin" / "python")


def test_mpich_says_the_same_as_open_mpi(models: dict[str, list[str]], mpich_python: str, tmp_path: Path) -> None:
    told = subprocess.run(
        [mpich_python, "-c", "from mpi4py import MPI; print(MPI.get_vendor()[0])"],
        capture_output=True, text=True, timeout=60, check=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert told.stdout.strip() == "MPICH"
    some = {name: models[name] for name in ("builtin", "Qwen3ForCausalLM")}
    (tmp_path / "open").mkdir()
    (tmp_path / "mpich").mkdir()
    _, ours = decode(sys.executable, tmp_path / "open", some, [3, 4], 4)
    _, theirs = decode(mpich_python, tmp_path / "mpich", some, [3, 4], 4)
    assert ours == theirs
    assert len(ours) == 6
