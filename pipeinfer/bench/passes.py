"""Passes of real shards to be timed, of stored or of random weights."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeinfer.core.errors import refuse
from pipeinfer.core.ports import ShardModel
from pipeinfer.core.slots import batch_in_order
from stages.checkpoint.checkpoint import Weights
from stages.checkpoint.random_weights import RandomCheckpoint
from stages.checkpoint.spec import ModelSpec, RopeSpec
from stages.kernels.library import library


def clock(threads: int) -> Callable[[], float]:
    """What times computing with so many ``threads``. One thread's processor time is what it would take on a core of its
    own, whoever else is about; that of several would leave out how they wait for each other."""
    return time.process_time if threads == 1 else time.perf_counter


def use_threads(threads: int) -> None:
    """From now on torch and the kernels have ``threads`` threads in this process."""
    import torch

    torch.set_num_threads(threads)
    if (kernels := library()) is not None:
        kernels.set_threads(threads)


def check_device(name: str) -> None:
    """Raise UserError if torch finds no ``name`` here."""
    import torch

    known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in known and not (name == "cuda" and known[1:]):
        refuse(f"torch finds no device {name} here", f"name one of {', '.join(known)}")


def random_model(layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> ModelSpec:
    """A model of the Llama family that nobody has trained."""
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        layer_count=layers,
        head_count=heads,
        kv_head_count=kv_heads,
        head_dim=hidden // heads,
        context=4096,
        norm_eps=1e-5,
        tied=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        rope=RopeSpec(),
        eos_tokens=(),
        dtype=None,
    )


def whole_shard(
    spec: ModelSpec, dtype: str, slots: int, weights: Weights | None = None, device: str = "cpu"
) -> ShardModel:
    """All layers of a model with ``slots`` slots on ``device``; of random weights unless some are given."""
    from stages.models.pair import DTYPES, load_llama

    weights = weights or RandomCheckpoint(spec)
    return load_llama(spec, weights, range(spec.layer_count), DTYPES[dtype], slots, device=device)


def one_pass(shard: ShardModel, rows: int, context: int) -> Callable[[], object]:
    """A pass of ``rows`` rows, the last of ``context`` positions, each seeing all before it; then their choices."""
    batch = batch_in_order([0] * rows, context - rows)

    def run() -> object:
        passing = shard.forward(batch, None)
        while True:
            try:
                next(passing)
            except StopIteration as done:
                return shard.sample(done.value, range(rows), 1)

    return run
