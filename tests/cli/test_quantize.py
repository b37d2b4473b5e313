"""`pipeinfer quantize` on the command line: a whole directory or none, one line for what cannot be, bounded memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.signals import end_in_order
from pipeinfer.cli.progress import ProgressBar
from stages.checkpoint.checkpoint import expected
from stages.checkpoint.quantizer import linears
from stages.checkpoint.safetensors_writer import SafetensorsWriter
from stages.checkpoint.spec import ModelSpec
from tests.cli.run import ROOT, here
from tests.models.tiny import make_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 2, "intermediate_size": 96}
    return make_tiny(tmp_path_factory.mktemp("quantize") / "source", "LlamaForCausalLM", **sizes)


def programmed(prelude: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``pipeinfer ARGUMENTS`` in a process of its own, after ``prelude``."""
    line = [sys.executable, "-c", f"{prelude}\nfrom pipeinfer.cli import main\nraise SystemExit(main())", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_what_cannot_be_is_refused_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    text, taken = tmp_path / "text", tmp_path / "taken"
    text.write_text("too short")
    taken.mkdir()
    (tmp_path / "latin").write_bytes(b"caf\xe9 " * 100)
    name = "model.layers.0.self_attn.q_proj.weight"
    cases = [
        (["--format", "int4"], f"--group 128 does not divide the 64 inputs of {name}; use --group 32"),
        (["--format", "int4", "--group", "48"], "--group 48; use a multiple of 32"),
        (["--format", "int4", "--group", "-32"], "--group -32; use a multiple of 32"),
        (["--format", "int8", "--out", str(taken)], f"{taken} exists"),
        (["--format", "int8", "--out", str(tmp_path / "no" / "out")], "make that directory first"),
        (["--format", "int8", "--calibrate", str(tmp_path / "none")], "none cannot be read"),
        (["--format", "int8", "--calibrate", str(text)], "holds"),
        (["--format", "int8", "--calibrate", str(tmp_path / "latin")], "is not UTF-8 text"),
    ]
    before = sorted(tmp_path.iterdir())
    for arguments, reason in cases:
        done = here("quantize", str(source), "--out", str(tmp_path / "out"), *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and reason in done.stderr, (arguments, done.stderr)
        assert sorted(tmp_path.iterdir()) == before


def test_sources_that_cannot_be_quantised_are_refused(source: Path, tmp_path: Path) -> None:
    out, once = str(tmp_path / "out"), str(tmp_path / "once")
    assert here("quantize", str(source), "--format", "int8", "--out", once).returncode == 0
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in source.iterdir():
        os.link(file, broken / file.name)
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-5])
    cases = [
        (once, "is quantised already (compressed-tensors)"),
        (str(broken), "is cut short"),
        (str(tmp_path / "model.gguf"), "is a GGUF file"),
        (str(tmp_path / "nowhere"), "no such model directory"),
    ]
    for model, reason in cases:
        done = here("quantize", model, "--format", "int8", "--out", out)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and reason in done.stderr, done.stderr
        assert not os.path.lexists(out)


def test_a_signal_in_the_middle_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell(self: ProgressBar, done: int, text: str) -> None:
        if text.startswith("model.layers.1."):
            assert [path.name.startswith(".out.") for path in tmp_path.iterdir()] == [True]
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ProgressBar, "tell", tell)
    take_back = end_in_order()
    try:
        done = here("quantize", str(source), "--format", "fp6", "--out", str(tmp_path / "out"))
    finally:
        take_back()
    assert done.returncode == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        done = here("quantize", str(source), "--format", "int8", "--out", str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "out cannot be written (File too large)" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_calibration_stores_an_ordinary_model(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Nobody on the island owns a car, so the postman walks.\n" * 40)
    out = tmp_path / "out"
    arguments = ("--format", "int4", "--group", "32", "--calibrate", str(text), "--out", str(out))
    assert here("quantize", str(source), *arguments).returncode == 0
    done = here("run", "--target", str(out), "--draft", "none", "--prompt", "The ferry", "--max-new-tokens", "8")
    assert done.returncode == 0 and done.stdout, done.stderr


def large_model(folder: Path, like: Path, vocab_size: int) -> Path:
    """A model of zeros whose embedding and head have ``vocab_size`` rows of 512 numbers."""
    folder.mkdir()
    config = json.loads((like / "config.json").read_text())
    config |= {"vocab_size": vocab_size, "hidden_size": 512, "intermediate_size": 512, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    spec = ModelSpec.read(folder)
    with SafetensorsWriter(folder, {name: ("BF16", shape) for name, shape in expected(spec)}) as writer:
        for name in linears(spec):
            writer.write(name, torch.ones(1, dict(expected(spec))[name][1], dtype=torch.bfloat16))
    return folder


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(source: Path, tmp_path: Path) -> None:
    peaks = []
    for vocab_size in (1_000, 150_000):
        model = large_model(tmp_path / f"model-{vocab_size}", source, vocab_size)
        prelude = "import atexit, resource\nfrom stages.checkpoint import quantizer\nquantizer.BLOCK = 1 << 20\n"
        prelude += "atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))"
        out = tmp_path / f"out-{vocab_size}"
        done = programmed(prelude, "quantize", str(model), "--format", "int8", "--out", str(out))
        assert done.returncode == 0, done.stderr
        peaks.append(1024 * int(done.stdout))
        (model / "model.safetensors").unlink()
        (out / "model.safetensors").unlink()
    grown = 2 * 2 * 512 * (150_000 - 1_000)
    print(f"{grown} bytes more of weights, {peaks[1] - peaks[0]} bytes more of memory")
    assert peaks[1] - peaks[0] < grown / 5
