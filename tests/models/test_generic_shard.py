"""Models of many architectures decode through transformers' own layers, on our slots, what transformers decodes."""

from __future__ import annotations

import functools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.placement.roles import split_layers
from stages.checkpoint.extents import TensorWindow
from stages.kernels.top_tokens import top_tokens
from stages.models.generic import GenericShard
from stages.models.generic_slots import SlotCache, UnsupportedError
from stages.models.generic_spec import GenericSpec
from tests.models.tiny_generic import MODELS, make_model
from tests.models.walk import Reference, compute, greedy, make_batch, prefill

PROMPTS = (
    [17, 301, 5, 488, 92, 260, 33, 410, 7, 151, 64],
    [9, 9, 44, 130],
    [501, 3, 77, 210, 398, 12, 480, 66, 205, 31, 119, 7, 350, 91, 22, 145, 60, 300, 41],
)


read_spec = functools.cache(GenericSpec.read)  # a probe each
read_reference = functools.cache(Reference)


def load(directory: Path, shards: int = 1, dtype: torch.dtype = torch.float32, capacity: int = 160) -> list[Any]:
    """The whole model in ``shards`` consecutive pieces."""
    spec = read_spec(directory)
    return [GenericShard.load(spec, layers, dtype, capacity) for layers in split_layers(spec.layer_count, [1] * shards)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("gemma2"), "gemma2", num_hidden_layers=4)


def test_tokens_equal_transformers(model: Path) -> None:
    reference = read_reference(model)
    whole, thirds = load(model), load(model, 3)
    texts = [reference.greedy(prompt, 20) for prompt in PROMPTS]
    assert sum(len(set(text)) for text in texts) > 20, "texts that loop would hide errors"
    for prompt, expected in zip(PROMPTS, texts, strict=True):
        assert greedy(whole, prompt, 6) == expected[:6]
        assert greedy(thirds, prompt, 20, chunk=3) == expected


def test_a_tree_in_scattered_slots_gives_the_logits_of_plain_text(model: Path) -> None:
    """Three branches in one batch, shuffled, in slots that hold what dead rows left there."""
    reference, shards, dice = read_reference(model), load(model, 3, capacity=96), random.Random(model.name)
    free = list(range(96))
    dice.shuffle(free)
    dead = [set(free[:row]) for row in range(40)]
    compute(shards, make_batch([dice.randrange(512) for _ in dead], range(40), free[:40], dead))
    dice.shuffle(free)
    prompt = [*PROMPTS[2], *PROMPTS[0]]
    canonical = [free.pop() for _ in prompt]
    prefill(shards, prompt, canonical, 7)
    rows: list[tuple[list[int], int, set[int]]] = []  # tokens from the root on, slot, slots of the prompt and ancestors
    for _ in range(3):
        path: list[int] = []
        seen = set(canonical)
        for _ in range(4):
            path, slot = [*path, dice.randrange(512)], free.pop()
            rows.append((path, slot, set(seen)))
            seen.add(slot)
    dice.shuffle(rows)
    positions = [len(prompt) + len(path) - 1 for path, _, _ in rows]
    batch = make_batch([path[-1] for path, _, _ in rows], positions, [r[1] for r in rows], [r[2] for r in rows])
    for (path, _, _), choices in zip(rows, shards[-1].sample(compute(shards, batch), range(12), 512), strict=True):
        expected = reference.logps([*prompt, *path])[-1]
        ours = torch.empty(512)
        for token, logp in choices:
            ours[token] = logp
        assert (ours - expected).abs().max() < 5e-4


def test_bfloat16_is_close(model: Path) -> None:
    exact, rounded = read_reference(model), Reference(model, torch.bfloat16)
    text = PROMPTS[2] + exact.greedy(PROMPTS[2], 20)
    truth, theirs = exact.logps(text), rounded.logps(text)
    ours = torch.full_like(truth, torch.nan)
    for row, choices in enumerate(prefill(load(model, 3, torch.bfloat16), text, list(range(len(text))), 7)):
        for token, logp in choices:
            ours[row, token] = logp
    known = ~ours.isnan()
    error, usual = (ours - truth)[known].abs(), (theirs - truth)[known].abs()
    assert error.mean() < 1.5 * usual.mean()


def stored_nbytes(directory: Path) -> int:
    files = directory.glob("*.safetensors")
    return sum(tensor.nbytes for file in files for tensor in load_file(file).values())


def test_weight_bytes_add_up(model: Path) -> None:
    spec, stored = read_spec(model), stored_nbytes(model)
    whole = load(model)[0].weight_nbytes
    assert stored <= whole < 1.01 * stored, "a router's few outputs are padded"
    shares = [shard.weight_nbytes for shard in load(model, 3)]
    embedding = spec.tied * spec.vocab_size * (32 if "opt" in model.name else spec.hidden_size) * 4
    assert sum(shares) == whole + embedding
    assert max(shares) < stored / 2 + embedding


def test_only_own_tensors_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_model(tmp_path, "mixtral")
    read: list[str] = []
    real = TensorWindow.__getitem__

    def noted(window: TensorWindow, parts: Any) -> torch.Tensor:
        read.append(window._stored.name)
        return real(window, parts)

    monkeypatch.setattr(TensorWindow, "__getitem__", noted)
    spec = GenericSpec.read(directory)
    assert not read
    GenericShard.load(spec, range(2, 4), torch.float32, 8)
    assert {name.split(".")[2] for name in read} == {"2", "3"}
    assert any(".experts.3.w2." in name for name in read), "the experts are stored one by one"
    read.clear()
    GenericShard.load(spec, range(4, 6), torch.float32, 8)
    assert {"model.norm.weight", "lm_head.weight"} <= set(read)
    assert "model.embed_tokens.weight" not in read


def test_an_abandoned_pass_leaves_nothing_behind(gemma2: Path) -> None:
    shards = load(gemma2)
    expected = read_reference(gemma2).greedy(PROMPTS[0], 30)
    steps = shards[0].forward(make_batch([1, 2], [90, 91], [3, 4], [set(), {3}]), None)
    next(steps), next(steps)
    assert not torch.is_inference_mode_enabled()
    steps.close()
    assert greedy(shards, PROMPTS[0], 30) == expected


def test_yields_after_each_layer_and_leaves_its_input_alone(gemma2: Path) -> None:
    first, last = load(gemma2, 2)
    batch = make_batch([1, 2, 3], range(3), range(3), [set(), {0}, {0, 1}])
    assert list(first.forward(batch, None)) == [0.0, 0.0]
    hidden = compute([first], batch)
    assert hidden.shape == (3, 64)
    before = hidden.clone()
    list(last.forward(batch, hidden))
    assert torch.equal(hidden, before)
    with pytest.raises(LocalProtocolError, match="embed"):
        list(last.forward(batch, None))
    with pytest.raises(LocalProtocolError, match="choose"):
        first.sample(hidden, [0], 1)


def test_no_rows_are_no_choices(model: Path) -> None:
    """As after a part of a prompt; found with GPT-2, which cannot be run without a row."""
    shards = load(model)
    assert shards[-1].sample(compute(shards, make_batch([1], [0], [0], [set()])), (), 1) == []


def test_a_layer_that_keeps_more_than_its_own_slots_is_noticed(gemma2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,), update = load(gemma2), SlotCache.update

    def update_twice(cache: SlotCache, keys: Any, values: Any, layer: int, *rest: Any) -> Any:
        update(cache, keys, values, layer, *rest)
        return update(cache, keys, values, layer, *rest)

    monkeypatch.setattr(SlotCache, "update", update_twice)
    with pytest.raises(UnsupportedError, match="writes the slots"):
        list(shard.forward(make_batch([1], [0], [0], [set()]), None))


def test_a_row_that_sees_nothing_poisons_nothing(gemma2: Path) -> None:
    shards = load(gemma2)
    expected = read_reference(gemma2).greedy(PROMPTS[0], 12)
    batch = make_batch([9] * 40, list(range(40)), list(range(40)), [set()] * 40)
    batch = replace(batch, ancestors=batch.ancestors[:0], ancestor_ends=np.zeros(40, np.int64))
    assert compute(shards, batch).isfinite().all()
    assert greedy(shards, PROMPTS[0], 12) == expected


def test_equal_logits_go_to_the_lowest_token() -> None:
    logits = torch.randn(9, 16).repeat(1, 32)  # token t ties with t + 16, t + 32, ...
    for row, (best,) in zip(logits, top_tokens(logits, 1), strict=True):
        most = top_tokens(row[None], 40)[0]
        assert [token for token, _ in most[:32]] == list(range(best[0], 512, 16))
        assert best == pytest.approx(most[0])
    assert len(top_tokens(logits, 1000)[0]) == 512
