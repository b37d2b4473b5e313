"""What `pipeinfer run` prints: text on stdout and the table on stderr, or one JSON object."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from stages.kernels.library import library
from tests.cli.run import ROOT, here, pipeinfer
from tests.models.tiny import make_tiny, make_tiny_pair

PROMPT = "def read_lines(path):\n"

TABLE = re.compile(
    r"policy plain, (?:fp32|bf16), 1 ranks on 1 hosts, 1 stages, \d+ threads a rank; "
    r"\d+ prompt tokens, 12 new, ended by length\n"
    r" +TTFT +TPOT +ITL p50/p90/p99 +tokens/s +acceptance_rate +accept_length +runs +cancelled +waste\n"
    r" *[\d.]+ ms +[\d.]+ ms +[\d.]+/[\d.]+/[\d.]+ ms +[\d.]+ +0\.00 +1\.00 +11 +0 +0\.00\n"
)


def test_text_goes_to_stdout_and_the_table_to_stderr() -> None:
    arguments = ["--prompt", PROMPT, "--max-new-tokens", "12", "--ignore-eos", "--policy", "plain"]
    plain = pipeinfer("run", *arguments)
    assert plain.returncode == 0, plain.stderr
    assert TABLE.fullmatch(plain.stderr.lstrip("\n")), plain.stderr
    found = json.loads(here("run", *arguments, "--json").stdout)
    assert plain.stdout == found["text"] + "\n"


def test_json_is_one_object_with_everything() -> None:
    result = pipeinfer("run", "--ranks", "2", "--json", "--max-new-tokens", "20", "--ignore-eos", stdin=PROMPT.encode())
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found.keys() == {
        "text", "prompt_tokens", "tokens", "finish_reason", "metrics", "config", "ranks", "meaningless", "top_logprobs",
    }  # fmt: skip
    assert not found["meaningless"]
    assert found["metrics"].keys() == {
        "ttft_ms", "tpot_ms", "e2el_ms", "itl_ms", "output_throughput", "acceptance_rate", "accept_length",
    "tokens_per_correction", "runs",
        "cancelled_runs", "waste", "bubble", "cancel_latency_ms", "calibration_error",
    }  # fmt: skip
    assert found["metrics"]["itl_ms"].keys() == {"p50", "p90", "p99"}
    assert (len(found["tokens"]), found["finish_reason"]) == (20, "length")
    assert found["config"]["policy"]["name"] == "continuous"
    assert [rank["roles"] for rank in found["ranks"]] == [["orchestrator", "drafter 0"], ["stage 0"]]
    assert [rank["layers"] for rank in found["ranks"]] == [None, [0, 7]]
    assert all(rank["weight_nbytes"] > 0 and rank["host"] for rank in found["ranks"])


def test_logprobs_are_added_when_asked_for() -> None:
    """By transformers' model of the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from pipeinfer.core.config import BUILTIN, model_directory

    arguments = ["--max-new-tokens", "8", "--ignore-eos", "--temperature", "0.8", "--json", "--logprobs"]
    arguments += ["--dtype", "fp32"]
    found = json.loads(here("run", "--prompt", PROMPT, *arguments).stdout)
    model = AutoModelForCausalLM.from_pretrained(model_directory(BUILTIN, "target"), dtype=torch.float32)
    tokens = found["prompt_tokens"] + found["tokens"]
    with torch.no_grad():
        logps = model(torch.tensor([tokens[:-1]])).logits[0, -8:].log_softmax(-1)
    wanted = [float(row[token]) for row, token in zip(logps, found["tokens"], strict=True)]
    assert found["logprobs"] == pytest.approx(wanted, abs=1e-3)


def test_a_stop_string_is_not_shown() -> None:
    arguments = ["run", "--prompt", PROMPT, "--max-new-tokens", "100", "--ignore-eos"]
    whole = here(*arguments).stdout
    word = whole[20:24]
    result = here(*arguments, "--stop", word, "--stop", "never said")
    assert result.stdout == whole[: whole.index(word)] + "\n"
    assert "ended by stop" in result.stderr


def test_verify_says_so() -> None:
    result = pipeinfer("run", "--ranks", "2", "--verify", "--max-new-tokens", "16", "--ignore-eos", "--prompt", PROMPT)
    assert result.returncode == 0, result.stderr
    assert result.stderr.endswith("verified: all 16 tokens equal plain decoding\n")


def test_a_stop_token_ends_the_text_and_is_not_shown(tmp_path: Path) -> None:
    """A model whose every token is a stop token says exactly one."""
    target = tmp_path / "target"
    make_tiny(target, "LlamaForCausalLM")
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(512))}))
    result = here("run", "--target", str(target), "--prompt", "x", "--json")
    found = json.loads(result.stdout)
    assert (len(found["tokens"]), found["finish_reason"], found["text"]) == (1, "stop", "")
    ignored = here("run", "--target", str(target), "--prompt", "x", "--json", "--ignore-eos", "--max-new-tokens", "5")
    assert len(json.loads(ignored.stdout)["tokens"]) == 5


@pytest.mark.slow
def test_bf16_decodes_on_several_ranks(tmp_path: Path) -> None:
    target, draft = make_tiny_pair(tmp_path, "MistralForCausalLM", seed=2)
    models = ["--target", str(target), "--draft", str(draft), "--dtype", "bf16"]
    result = pipeinfer("run", *models, "--ranks", "2", "--prompt", "The ferry", "--max-new-tokens", "24", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["tokens"]
    alone = [*models, "--prompt", "The ferry", "--max-new-tokens", "1", "--json", "--policy", "plain"]
    one = json.loads(here("run", *alone).stdout)
    assert 2.0 <= one["ranks"][0]["weight_nbytes"] / _parameters(target) < 2.02, "the norms may have 32 bits"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_threads_and_dtypes_are_told(ranks: int) -> None:
    """The dtype that auto came to, of each model, and the threads of each rank, which may be more than cores."""
    activations = "fp32" if library() is None else "int8"
    how = ("--threads", "3", "--numerics", "fast", "--activations", activations)
    found = json.loads(pipeinfer(*RUN, "--json", "--ranks", str(ranks), *how).stdout)
    assert [rank["threads"] for rank in found["ranks"]] == [3] * ranks
    config = found["config"]
    assert (config["threads"], config["numerics"], config["activations"]) == (3, "fast", activations)
    dtype = "fp32" if library() is None else "bf16"
    assert (config["dtype"], config["draft_dtypes"]) == (dtype, [dtype])


RUN = ("run", "--prompt", PROMPT, "--max-new-tokens", "4")


@pytest.mark.slow
def test_who_has_no_kernels_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.cli.run.NOTE", re.compile("never"))
    told = pipeinfer(*RUN, "--ranks", "2", "--json", "--verify").stderr
    assert told.count("without the kernel library") == (library() is None)
    assert "without the kernel library" not in pipeinfer(*RUN, "--json", "--dtype", "fp32").stderr


def _parameters(directory: Path) -> int:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", framework="np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    total = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        total += size
    return total


@pytest.mark.slow
def test_a_model_of_another_family_decodes_on_several_ranks(tmp_path: Path) -> None:
    """GPT-2, which has no shard of its own, with its own first layers as draft."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.models.tiny import VOCAB_SIZE, make_tokenizer

    sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 64, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
    for name, layers in (("target", 4), ("draft", 1)):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_layer=layers, bos_token_id=0, eos_token_id=0, **sizes))  # type: ignore[arg-type]
        model.save_pretrained(tmp_path / name)
        make_tokenizer(tmp_path / name)
    models = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]
    arguments = ["--ranks", "2", "--prompt", "The ferry", "--max-new-tokens", "12", "--ignore-eos", "--verify"]
    result = pipeinfer("run", *models, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr.endswith("verified: all 12 tokens equal plain decoding\n")


def test_a_chat_template_is_applied(tmp_path: Path) -> None:
    target = tmp_path / "target"
    make_tiny(target, "LlamaForCausalLM")
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    path.write_text(json.dumps(config))
    (target / "chat_template.jinja").unlink(missing_ok=True)
    arguments = ["run", "--target", str(target), "--max-new-tokens", "3", "--ignore-eos", "--json", "--prompt"]
    chat = json.loads(here(*arguments, "hi", "--chat").stdout)
    same = json.loads(here(*arguments, "<user>hi<assistant>").stdout)
    assert chat["prompt_tokens"] == same["prompt_tokens"]


def test_forced_acceptance_is_labelled_wherever_its_words_are_shown() -> None:
    arguments = ["run", "--prompt", PROMPT, "--max-new-tokens", "12", "--forced-acceptance", "0.7,0.1"]
    plain = here(*arguments, "--verify")
    assert plain.returncode == 0, plain.stderr
    assert re.fullmatch(r"(\d+ ){11}\d+\n", plain.stdout), "numbers of tokens, not text"
    label, _, table, *_, verified = plain.stderr.splitlines()
    assert "tokens without meaning" in label
    assert table.startswith("meaningless text, acceptance forced to 0.7,0.1; policy continuous")
    assert verified == "verified: all 12 tokens equal plain decoding"
    found = json.loads(here(*arguments, "--json").stdout)
    assert found["meaningless"]
    assert found["config"]["forced_acceptance"] == [0.7, 0.1]
    assert f"{found['text']}\n" == plain.stdout == f"{' '.join(map(str, found['tokens']))}\n"


def test_a_config_is_enough_for_random_weights(tmp_path: Path) -> None:
    """Of a target and a draft with vocabularies of their own; any text is a prompt."""
    target, draft = make_tiny_pair(tmp_path, "Qwen2ForCausalLM", vocab_size=600)
    for place in (target, draft):
        for path in place.iterdir():
            if path.name != "config.json":
                path.unlink()
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | {"vocab_size": 512}))
    models = ["--target", str(target), "--draft", str(draft), "--random-weights", "--forced-acceptance", "0.8"]
    arguments = ["--ranks", "3", "--dtype", "bf16", "--max-new-tokens", "24", "--verify", "--json", "--prompt", "né"]
    result = pipeinfer("run", *models, *arguments)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["prompt_tokens"] == list("né".encode())
    assert len(found["tokens"]) == 24
    assert all(rank["weight_nbytes"] > 0 for rank in found["ranks"])


def test_help_tells_every_flag() -> None:
    told = here("run", "--help").stdout + here("batch", "--help").stdout  # of which run.py has flags, too
    source = (ROOT / "pipeinfer/cli/run.py").read_text()
    for flag in re.findall(r'add_argument\(\s*"(--[\w-]+)"', source):
        assert flag in told
