"""The built-in pair is what the model card says, and the program that trains it still runs."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pair.corpus import HELD_OUT, read_corpus

ROOT = Path(__file__).resolve().parents[2]
BUILTIN = ROOT / "pipeinfer/builtin"


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)


@pytest.mark.parametrize("name", ["target", "draft"])
def test_transformers_loads_the_builtin_models(name: str) -> None:
    model = load(BUILTIN / name)
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN / name, local_files_only=True)
    text = "def read(path):\n    return 'ä\t€'\n"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))


def test_the_builtin_models_are_small_and_the_draft_much_smaller() -> None:
    assert sum(path.stat().st_size for path in BUILTIN.rglob("*")) < 24_000_000
    target, draft = (load(BUILTIN / name).num_parameters() for name in ("target", "draft"))
    assert target >= 5_000_000
    assert draft * 6 <= target


def test_both_models_have_the_same_tokenizer() -> None:
    assert (BUILTIN / "target/tokenizer.json").read_bytes() == (BUILTIN / "draft/tokenizer.json").read_bytes()


def test_held_out_modules_are_not_in_the_corpus() -> None:
    corpus = read_corpus(Path(sysconfig.get_path("stdlib")))
    assert corpus.held_out.keys() == HELD_OUT
    assert not HELD_OUT & corpus.train.keys()
    assert not set(corpus.held_out.values()) & set(corpus.train.values()), "not under another name either"
    assert len(corpus.train) > 100


@pytest.mark.slow
def test_training_runs_end_to_end(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.train_pair", "--smoke", "--device", "cpu", "--threads", "1"]
    line += ["--out", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"target", "draft", "MODEL_CARD.md"}
    assert load(tmp_path / "target").num_parameters() > 6 * load(tmp_path / "draft").num_parameters()
    assert "python -m benchmarks.train_pair" in (tmp_path / "MODEL_CARD.md").read_text(encoding="utf-8")
