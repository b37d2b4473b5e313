"""The shard decodes exactly what transformers decodes, however the layers, the rows and the slots are laid out."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.checkpoint.checkpoint import Checkpoint
from stages.checkpoint.spec import ModelSpec
from tests.models.tiny import CONFIGS, make_tiny, make_tiny_pair
from tests.models.walk import EACH_KIND, KINDS, Load, Reference, compute, greedy, load_shards, make_batch, prefill

PROMPT = [17, 301, 5, 488, 92, 260, 33, 410, 7, 151, 64]
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-head_dim": ("LlamaForCausalLM", {"head_dim": 24}),
    "llama-multi_query": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama-linear": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "llama-dynamic": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}}),
    "llama-llama3": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}}),
    "llama-sharded": ("LlamaForCausalLM", {"max_shard_size": "300KB"}),
    "mistral": ("MistralForCausalLM", {"head_dim": 32}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 256}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-tied-yarn": (
        "Qwen2ForCausalLM",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32}),
    "qwen3-tied-bias": ("Qwen3ForCausalLM", {"tie_word_embeddings": True, "attention_bias": True}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=EACH_KIND)
def kind(request: pytest.FixtureRequest) -> str:
    """In torch and on the C kernels."""
    return str(request.param)


@pytest.fixture
def load(kind: str) -> Load:
    return partial(load_shards, kind=kind)


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, overrides = VARIANTS[request.param]
    return make_tiny(tmp_path_factory.mktemp(request.param), architecture, seed=3, **overrides)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), "Qwen3ForCausalLM", seed=5)


def test_tokens_and_logits_equal_transformers(variant: Path, load: Load) -> None:
    reference = Reference(variant)
    expected = reference.greedy(PROMPT, 40)
    assert len(set(expected)) > 15, "a text that loops would hide errors"
    whole, thirds = load(variant), load(variant, 3)
    assert greedy(whole, PROMPT, 40) == expected
    assert greedy(thirds, PROMPT, 40, chunk=3) == expected
    text = PROMPT + expected
    logps = reference.logps(text)
    best = logps.sort(dim=-1, descending=True, stable=True).indices[:, :8].tolist()
    for row, choices in enumerate(prefill(load(variant, 2), text, list(range(len(text))), 13)):
        assert [token for token, _ in choices] == best[row]
        for token, logp in choices:
            assert abs(logp - float(logps[row, token])) < 1e-4


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_tree_rows_in_scattered_slots(architecture: str, tmp_path: Path, load: Load) -> None:
    """Right and wrong guesses in one batch, in any order, in slots that hold what dead rows left there."""
    directory = make_tiny(tmp_path, architecture, seed=8, num_hidden_layers=3)
    expected = PROMPT + Reference(directory).greedy(PROMPT, 60)
    shards = load(directory, 2, capacity=96)
    dice = random.Random(architecture)
    free = list(range(96))
    dice.shuffle(free)
    canonical = [free.pop() for _ in range(len(PROMPT) - 1)]
    prefill(shards, PROMPT[:-1], canonical, 4)
    while len(canonical) < len(expected) - 4:
        root = len(canonical)
        rows: list[tuple[int, int, int, set[int], bool]] = []  # token, position, slot, ancestors' slots, right
        ancestors: set[int] = set()
        for depth in range(dice.randint(1, 4)):
            right = free.pop()
            rows.append((expected[root + depth], root + depth, right, set(ancestors), True))
            wrong = [free.pop(), free.pop()]
            rows.append((dice.randrange(512), root + depth, wrong[0], set(ancestors), False))
            rows.append((dice.randrange(512), root + depth + 1, wrong[1], ancestors | {wrong[0]}, False))
            ancestors.add(right)
        dice.shuffle(rows)
        tokens, positions, slots, seen, rights = map(list, zip(*rows, strict=True))
        batch = make_batch(tokens, positions, slots, [own | set(canonical) for own in seen])
        wanted = [row for row, right in enumerate(rights) if right]
        chosen = shards[-1].sample(compute(shards, batch), wanted, 1)
        assert [choice[0][0] for choice in chosen] == [expected[positions[row] + 1] for row in wanted]
        canonical += sorted((slots[row] for row in wanted), key=lambda slot: positions[slots.index(slot)])
        free += [slot for slot, right in zip(slots, rights, strict=True) if not right]
        dice.shuffle(free)


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_bfloat16_is_close(architecture: str, tmp_path: Path, load: Load) -> None:
    directory = make_tiny(tmp_path, architecture, seed=4, dtype=torch.bfloat16, initializer_range=0.1)
    exact, rounded = Reference(directory), Reference(directory, torch.bfloat16)
    text = PROMPT + exact.greedy(PROMPT, 40)
    truth, theirs = exact.logps(text), rounded.logps(text)
    ours = torch.full_like(truth, torch.nan)
    for row, choices in enumerate(prefill(load(directory, 3, torch.bfloat16), text, list(range(len(text))), 7)):
        for token, logp in choices:
            ours[row, token] = logp
    known = ~ours.isnan()
    error, usual = (ours - truth)[known].abs(), (theirs - truth)[known].abs()
    assert error.mean() < 1.3 * usual.mean()
    assert error.max() < 2 * usual.max()


def test_a_draft_is_sometimes_right(tmp_path: Path, load: Load) -> None:
    target_dir, draft_dir = make_tiny_pair(tmp_path, "LlamaForCausalLM", 1)
    text = PROMPT + greedy(load(target_dir), PROMPT, 60)
    guesses = prefill(load(draft_dir), text, list(range(len(text))), 16)
    right = [
        guess[0][0] == token for guess, token in zip(guesses[len(PROMPT) - 1 :], text[len(PROMPT) :], strict=False)
    ]
    assert 0.1 < sum(right) / len(right) < 0.9


def test_an_abandoned_pass_leaves_nothing_behind(tiny: Path, load: Load) -> None:
    shards = load(tiny)
    expected = Reference(tiny).greedy(PROMPT, 12)
    steps = shards[0].forward(make_batch([1, 2], [0, 1], [3, 4], [set(), {3}]), None)
    next(steps), next(steps), next(steps)
    assert not torch.is_inference_mode_enabled()
    steps.close()
    assert greedy(shards, PROMPT, 12) == expected


def test_yields_in_each_layer_and_leaves_its_input_alone(tiny: Path, load: Load, kind: str) -> None:
    first, last = load(tiny, 2)
    batch = make_batch(PROMPT, range(len(PROMPT)), range(len(PROMPT)), [set(range(row)) for row in range(len(PROMPT))])
    assert len(list(first.forward(batch, None))) == 3 * {"torch": 2, "kernels": 1}[kind]
    hidden = compute([first], batch)
    assert hidden.shape == (len(PROMPT), 64)
    before = hidden.clone()
    list(last.forward(batch, hidden))
    assert torch.equal(hidden, before)


def test_a_row_that_sees_nothing_poisons_nothing(tiny: Path, load: Load) -> None:
    shards = load(tiny)
    expected = Reference(tiny).greedy(PROMPT, 12)
    batch = make_batch([9] * 40, list(range(40)), list(range(40)), [set()] * 40)
    batch = replace(batch, ancestors=batch.ancestors[:0], ancestor_ends=np.zeros(40, np.int64))
    assert compute(shards, batch).isfinite().all()
    assert greedy(shards, PROMPT, 12) == expected


def test_equal_logits_go_to_the_lowest_token(tmp_path: Path, load: Load) -> None:
    def repeat(model: Any) -> None:
        model.lm_head.weight.copy_(model.lm_head.weight[:16].repeat(32, 1))  # token t ties with t + 16, t + 32, ...

    shards = load(make_tiny(tmp_path, "LlamaForCausalLM", edit=repeat))
    hidden = torch.randn(9, 64)
    for row in range(9):
        best = shards[0].sample(hidden, [row], 1)[0]
        most = shards[0].sample(hidden, [row], 40)[0]
        assert [token for token, _ in most[:32]] == list(range(best[0][0], 512, 16))
        assert best[0] == pytest.approx(most[0])
        assert [token for token, _ in most[32:]] == list(range(most[32][0], most[32][0] + 8 * 16, 16))
    assert len(shards[0].sample(hidden, [3, 1], 1000)[1]) == 512


def test_weight_bytes(tmp_path: Path, load: Load, kind: str) -> None:
    embedding, norms = 512 * 64 * 4, 13 * 64 * 4  # the kernels keep norms in float32
    for tied in (False, True):
        directory = make_tiny(tmp_path / str(tied), "LlamaForCausalLM", tie_word_embeddings=tied)
        stored = sum(tensor.nbytes for tensor in load_file(directory / "model.safetensors").values())
        assert load(directory)[0].weight_nbytes == stored
        assert load(directory, dtype=torch.bfloat16)[0].weight_nbytes == (stored + (kind == "kernels") * norms) // 2
        assert sum(shard.weight_nbytes for shard in load(directory, 3)) == stored + tied * embedding


@pytest.mark.parametrize("kept", ["both", "embedding", "head"])
def test_tied_models_that_store_a_head(tmp_path: Path, kept: str, load: Load) -> None:
    """transformers ties unless both are stored and differ; where only one is stored, it is both."""
    directory = make_tiny(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    embedding = tensors["model.embed_tokens.weight"]
    if kept != "embedding":
        tensors["lm_head.weight"] = embedding.flip(0).contiguous() if kept == "both" else embedding.clone()
    if kept == "head":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, path, {"format": "pt"})
    expected = Reference(directory).greedy(PROMPT, 20)
    assert greedy(load(directory), PROMPT, 20) == expected
    assert greedy(load(directory, 3), PROMPT, 20) == expected


def test_only_the_ends_embed_and_choose(tiny: Path, kind: str) -> None:
    spec, checkpoint = ModelSpec.read(tiny), Checkpoint(tiny)
    middle = KINDS[kind].load(spec, checkpoint, range(2, 4), torch.float32, 8)
    with pytest.raises(AssertionError, match="embed"):
        list(middle.forward(make_batch([1], [0], [0], [set()]), None))
    with pytest.raises(AssertionError, match="choose"):
        middle.sample(torch.zeros(1, 64), [0], 1)
