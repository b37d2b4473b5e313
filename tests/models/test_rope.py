"""Frequencies, cosines and sines agree with transformers bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from stages.checkpoint.spec import ModelSpec
from stages.models.rope import cosines_sines, inverse_frequencies
from tests.models.tiny import tiny_config

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 1000000},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 1.7},
    {"rope_type": "dynamic", "factor": 3.3, "original_max_position_embeddings": 100},
    {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0},
    {**LLAMA3, "factor": 32, "original_max_position_embeddings": 64},
    {**LLAMA3, "factor": 2.0},
    {**YARN, "original_max_position_embeddings": 32768, "rope_theta": 1000000.0},
    {**YARN, "original_max_position_embeddings": 64, "truncate": False},
    {**YARN, "original_max_position_embeddings": 64, "attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.3},
    {**YARN, "original_max_position_embeddings": 100, "factor": None},
    {**YARN, "original_max_position_embeddings": 64, "factor": 0.5},
    {**YARN},
]


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("context", [256, 3000, 131072])
@pytest.mark.parametrize("head_dim", [10, 64, 128])
def test_bits_equal_transformers(tmp_path: Path, rope: dict[str, Any], context: int, head_dim: int) -> None:
    config = tiny_config(
        "LlamaForCausalLM", rope_parameters=dict(rope), max_position_embeddings=context, head_dim=head_dim
    )
    compare(tmp_path, config)


@pytest.mark.parametrize("rope", [LLAMA3 | {"factor": 4.0}, YARN], ids=str)
def test_original_context_beside_the_rope_wins(tmp_path: Path, rope: dict[str, Any]) -> None:
    both = dict(rope) | {"original_max_position_embeddings": 64}
    config = tiny_config("LlamaForCausalLM", rope_parameters=both, original_max_position_embeddings=128)
    compare(tmp_path, config)


def compare(directory: Path, config: Any) -> None:
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    spec = ModelSpec.read(directory)
    theirs: Any = LlamaRotaryEmbedding(config)
    frequencies, factor = inverse_frequencies(spec.rope, spec.head_dim, spec.context)
    assert torch.equal(frequencies, theirs.inv_freq)
    assert factor == theirs.attention_scaling
    positions = torch.cat([torch.arange(256), torch.arange(0, spec.context, 997)])
    cosines, sines = cosines_sines(positions, frequencies, factor)
    their_cosines, their_sines = theirs(torch.zeros(1), positions[None])
    assert torch.equal(torch.cat([cosines, cosines], -1), their_cosines[0])
    assert torch.equal(torch.cat([sines, sines], -1), their_sines[0])
