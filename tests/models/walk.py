"""Driving shards by hand: batches built from explicit slots, as a stage would build them from its slot table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipeinfer.core.ports import Batch, SampledToken
from pipeinfer.placement.roles import split_layers
from stages.checkpoint.checkpoint import Checkpoint
from stages.checkpoint.spec import ModelSpec
from stages.kernels.library import library
from stages.models.kernel_shard import KernelShard
from stages.models.llama import LlamaShard

CAPACITY = 160
KINDS = {"torch": LlamaShard, "kernels": KernelShard}
"""The Llama family's shards."""
NO_KERNELS = pytest.mark.skipif(library() is None, reason="there is no library of kernels")
EACH_KIND = ["torch", pytest.param("kernels", marks=NO_KERNELS)]
Load = Callable[..., list[Any]]
"""``load_shards`` of a kind."""


def load_shards(
    directory: Path,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    capacity: int = CAPACITY,
    device: str = "cpu",
    kind: str = "torch",
) -> list[Any]:
    """The whole model in ``shards`` consecutive pieces, as even as they go, of a kind of KINDS."""
    spec, checkpoint = ModelSpec.read(directory), Checkpoint(directory)
    checkpoint.validate(spec)
    pieces = split_layers(spec.layer_count, [1] * shards)
    more = {} if kind == "kernels" else {"device": device}
    return [KINDS[kind].load(spec, checkpoint, layers, dtype, capacity, **more) for layers in pieces]


def make_batch(
    tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], seen: Sequence[set[int]]
) -> Batch:
    """Row r writes slot ``slots[r]`` and sees the slots ``seen[r]`` and its own."""
    paths = [[*sorted(own - {slot}), slot] for own, slot in zip(seen, slots, strict=True)]
    rows, nothing = (np.array(tokens), np.array(positions), np.array(slots)), np.zeros(len(tokens), np.int64)
    ends = np.cumsum([len(path) for path in paths])
    return Batch(*rows, (np.zeros((0, 2), np.int64),), nothing, nothing, np.concatenate(paths), ends)


def compute(shards: Sequence[Any], batch: Batch) -> Any:
    """Push a batch through all shards; returns the last one's activations."""
    hidden = None
    for shard in shards:
        steps = shard.forward(batch, hidden)
        while True:
            try:
                assert next(steps) == 0.0
            except StopIteration as end:
                hidden = end.value
                break
    return hidden


def prefill(shards: Sequence[Any], tokens: Sequence[int], slots: Sequence[int], chunk: int) -> list[list[SampledToken]]:
    """Run ``tokens`` in chunks of ``chunk`` rows, token i in slot ``slots[i]``; returns 8 choices after each."""
    choices = []
    for start in range(0, len(tokens), chunk):
        rows = range(start, min(start + chunk, len(tokens)))
        seen = [set(slots[:row]) for row in rows]
        batch = make_batch([tokens[row] for row in rows], list(rows), [slots[row] for row in rows], seen)
        choices += shards[-1].sample(compute(shards, batch), range(len(rows)), 8)
    return choices


def greedy(shards: Sequence[Any], prompt: Sequence[int], count: int, chunk: int = 5) -> list[int]:
    """Plain greedy decoding: chunked prefill, then one row at a time, slots in order."""
    slots = list(range(len(prompt) + count))
    tokens = list(prompt)
    tokens.append(prefill(shards, prompt, slots, chunk)[-1][0][0])
    while len(tokens) < len(prompt) + count:
        last = len(tokens) - 1
        batch = make_batch([tokens[last]], [last], [slots[last]], [set(slots[:last])])
        tokens.append(shards[-1].sample(compute(shards, batch), [0], 1)[0][0][0])
    return tokens[len(prompt) :]


class Reference:
    """transformers' own model of a directory."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        self.model.generation_config.eos_token_id = None  # texts of full length

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        out = self.model.generate(torch.tensor([list(prompt)]), do_sample=False, max_new_tokens=count)
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens

    @torch.no_grad()
    def logps(self, tokens: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after each token: float32 [tokens, vocabulary]."""
        logits: torch.Tensor = self.model(torch.tensor([list(tokens)])).logits[0]
        return logits.float().log_softmax(-1)
