"""Shards on a GPU: the built-in target decodes the tokens that it decodes on the processor, and passes can be timed."""

from __future__ import annotations

import pytest
import torch

from pipeinfer.bench.measure import Probe
from pipeinfer.core.config import BUILTIN, model_directory
from tests.models.walk import greedy, load_shards, prefill

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
PROMPT = [7, 260, 33, 410, 17, 301, 5, 488, 92, 151, 64]


def test_two_shards_decode_as_on_the_processor() -> None:
    target = model_directory(BUILTIN, "target")
    here, there = load_shards(target), load_shards(target, 2, device="cuda")
    tokens = greedy(here, PROMPT, 48)
    assert greedy(there, PROMPT, 48) == tokens
    text = PROMPT + tokens
    slots = list(range(len(text)))
    for ours, theirs in zip(prefill(here, text, slots, 9), prefill(there, text, slots, 9), strict=True):
        assert ours[0][0] == theirs[0][0]
        assert theirs[0][1] == pytest.approx(ours[0][1], abs=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_layer_takes_its_time(dtype: str) -> None:
    assert 1e-6 < Probe("cuda").overhead_s(dtype) < 1e-2
