"""Random weights: the same for every cut, of ordinary size, whatever the family and the depth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stages.checkpoint.random_weights import RandomCheckpoint, random_tensor
from stages.checkpoint.spec import ModelSpec
from stages.models.llama import LlamaShard
from tests.models.tiny import CONFIGS, tiny_config
from tests.models.walk import CAPACITY, compute, make_batch


def spec_of(folder: Path, architecture: str, **overrides: object) -> ModelSpec:
    config = tiny_config(architecture, **overrides).to_dict()
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    return ModelSpec.read(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_any_cut_has_the_same_weights(architecture: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, architecture, tie_word_embeddings=tied)

    def load(*layers: range) -> list[LlamaShard]:
        return [LlamaShard.load(spec, RandomCheckpoint(spec), part, dtype, CAPACITY) for part in layers]

    whole, cut = load(range(6)), load(range(2), range(2, 6))
    batch = make_batch(range(20), range(20), range(20), [set(range(row)) for row in range(20)])
    hidden = [compute(shards, batch) for shards in (whole, cut)]
    assert torch.equal(*hidden)
    assert whole[0].sample(hidden[0], range(20), 3) == cut[1].sample(hidden[1], range(20), 3)


def test_activations_stay_of_ordinary_size_in_a_deep_model(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "LlamaForCausalLM", num_hidden_layers=80)
    shard = LlamaShard.load(spec, RandomCheckpoint(spec), range(80), torch.bfloat16, CAPACITY)
    batch = make_batch(range(20), range(20), range(20), [set(range(row)) for row in range(20)])
    assert 0.1 < compute([shard], batch).float().std() < 100


def test_numbers_follow_from_the_name() -> None:
    one, again, other = (random_tensor(name, (64, 48), torch.float32) for name in ("a", "a", "b"))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.var() * 48 == pytest.approx(1, abs=0.1)
    assert torch.equal(random_tensor("a", (64, 48), torch.bfloat16), one.bfloat16())
    norm = random_tensor("a", (1000,), torch.float32)
    assert 0.5 <= norm.min() < norm.max() <= 1.5
