"""A sliding window counts where the served context reaches it: then transformers' own masks decide, in trees, too."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.preflight import clear
from pipeinfer import Engine
from pipeinfer.core.config import Config
from pipeinfer.core.errors import UserError
from pipeinfer.placement.roles import split_layers
from stages.checkpoint.spec import ModelSpec
from stages.models.generic import GenericShard
from stages.models.generic_spec import GenericSpec
from tests.models.tiny import make_tiny, make_tiny_pair
from tests.models.walk import Reference, compute, greedy, make_batch, prefill

WINDOW = 12
ON: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralForCausalLM", {"sliding_window": WINDOW}),
    "mistral-types": (
        "MistralForCausalLM",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 3},
    ),
    "qwen2": ("Qwen2ForCausalLM", ON | {"max_window_layers": 1}),
    "qwen2-types": ("Qwen2ForCausalLM", ON | {"layer_types": ["sliding_attention", "full_attention"] * 3}),
    "qwen3": ("Qwen3ForCausalLM", ON | {"max_window_layers": 0}),
}
PROMPT = [17, 301, 5, 488, 92, 260, 33, 410, 7, 151, 64, 9, 9, 44, 130, 501, 3, 77, 210, 398]


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, keys = KINDS[request.param]
    return make_tiny(tmp_path_factory.mktemp(request.param), architecture, **keys)


def cleared(model: Path, context: int, draft: str = "none") -> Any:
    drafts = () if draft == "none" else (draft,)
    policy = {"name": "plain", "speculate": draft != "none"}
    return clear(Config(str(model), drafts, policy, context=context), 1)


@pytest.mark.parametrize(
    ("context", "kind"), [(WINDOW, ModelSpec), (WINDOW - 1, ModelSpec), (WINDOW + 1, GenericSpec), (0, GenericSpec)]
)
def test_the_served_context_decides(model: Path, context: int, kind: type) -> None:
    found = cleared(model, context)
    assert type(found.target[0]) is kind and found.context == (context or 256)


@pytest.mark.parametrize(("context", "kind"), [(WINDOW, ModelSpec), (WINDOW + 1, GenericSpec)])
def test_the_same_for_drafts(tmp_path: Path, context: int, kind: type) -> None:
    target, draft = make_tiny_pair(tmp_path, "MistralForCausalLM")
    _ = make_tiny(draft, "MistralForCausalLM", sliding_window=WINDOW)
    found = cleared(target, context, str(draft))
    assert type(found.target[0]) is ModelSpec and type(found.drafts[0][0]) is kind


def test_a_draft_that_ends_before_its_window_has_none(tmp_path: Path) -> None:
    target, draft = make_tiny_pair(tmp_path, "MistralForCausalLM")
    _ = make_tiny(draft, "MistralForCausalLM", sliding_window=64, max_position_embeddings=64)
    assert type(cleared(target, 256, str(draft)).drafts[0][0]) is ModelSpec


def load(model: Path, shards: int) -> list[Any]:
    spec = GenericSpec.read(model)
    return [
        GenericShard.load(spec, layers, torch.float32, 160) for layers in split_layers(spec.layer_count, [1] * shards)
    ]


def test_tokens_beyond_the_window(model: Path) -> None:
    reference = Reference(model)
    expected = reference.greedy(PROMPT, 40)
    assert greedy(load(model, 1), PROMPT, 40) == expected
    assert greedy(load(model, 3), PROMPT, 40, chunk=3) == expected


def test_rows_of_a_tree(model: Path) -> None:
    """Twelve guesses in three branches, longer than the window together with the text, in a random order."""
    shards, reference, dice = load(model, 2), Reference(model), random.Random(3)
    slots = dice.sample(range(100), len(PROMPT) + 12)
    canonical, free = slots[: len(PROMPT)], slots[len(PROMPT) :]
    prefill(shards, PROMPT, canonical, 7)
    rows: list[tuple[list[int], int, set[int]]] = []  # tokens from the root on, slot, slots before it
    for _ in range(3):
        path: list[int] = []
        seen = set(canonical)
        for _ in range(4):
            path, slot = [*path, dice.randrange(512)], free.pop()
            rows.append((path, slot, set(seen)))
            seen.add(slot)
    dice.shuffle(rows)
    positions = [len(PROMPT) + len(path) - 1 for path, _, _ in rows]
    batch = make_batch([row[0][-1] for row in rows], positions, [row[1] for row in rows], [row[2] for row in rows])
    for (path, _, _), choices in zip(rows, shards[-1].sample(compute(shards, batch), range(12), 512), strict=True):
        ours = torch.empty(512)
        for token, logp in choices:
            ours[token] = logp
        assert (ours - reference.logps([*PROMPT, *path])[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_whole_job_with_speculation(tmp_path: Path, kind: str) -> None:
    architecture, keys = KINDS[kind]
    target, draft = make_tiny_pair(tmp_path, architecture, **keys)
    expected = Reference(target).greedy(PROMPT, 60)
    with Engine(str(target), str(draft)) as engine:
        found = engine.generate(PROMPT, max_new_tokens=60, ignore_eos=True)
    assert found.tokens == expected


def test_random_weights_have_no_windows(model: Path) -> None:
    with pytest.raises(UserError, match="no random weights are made for windows of 12 tokens; ask for less --context"):
        clear(Config(str(model), (), forced_acceptance=(0.5,), random_weights=True), 1)
