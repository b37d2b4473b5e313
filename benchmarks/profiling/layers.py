"""What the shard takes beside the kernels it calls: its layers against the bare torch operations of the same layers.

The bare layer computes the same function with the same kernels: norms, linears, rotation, attention, gate. Its keys,
values and rotations lie ready: it has no slots to write to or to choose from, no mask, and nobody listens between its
halves.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from benchmarks.profiling.costs import Cost, Stopwatch
from pipeinfer.bench.passes import random_model
from pipeinfer.core.slots import batch_in_order
from stages.checkpoint.random_weights import RandomCheckpoint
from stages.checkpoint.spec import ModelSpec
from stages.models.llama import LlamaShard

SHARE = 0.1
"""Of a bare layer's time, which the shard may take beside it."""
MODELS = {
    "built-in": random_model(layers=8, hidden=256, intermediate=640, heads=8, kv_heads=4, vocab=64),
    "300M": random_model(layers=4, hidden=1024, intermediate=2816, heads=16, kv_heads=4, vocab=64),
}
ROWS, CONTEXTS = (1, 8), (128, 1024)
SECONDS = 2.0


def costs() -> Iterator[Cost]:
    """For each model, number of rows and context: a bare layer, and what the shard takes more."""
    torch.set_num_threads(1)
    for name, spec in MODELS.items():
        shard = LlamaShard.load(spec, RandomCheckpoint(spec), range(spec.layer_count), torch.float32, max(CONTEXTS))
        for rows in ROWS:
            for context in CONTEXTS:
                bare_us, more_us = _pair_us(_bare(spec, rows, context), _pass(shard, spec, rows, context))
                what = f"layer of {name}, {rows} rows, {context} slots"
                yield Cost(f"{what}: bare", [bare_us / spec.layer_count])
                yield Cost(f"{what}: shard beside it", [more_us / spec.layer_count], SHARE * bare_us / spec.layer_count)


def _pair_us(bare: Callable[[], object], whole: Callable[[], object]) -> tuple[float, float]:
    """What ``bare`` takes, and what ``whole`` takes more: medians of pairs, as both meet the same neighbours."""
    watch, until = Stopwatch(), time.monotonic() + SECONDS
    while time.monotonic() < until:
        for call in (bare, whole):
            call()  # what came before has left other things in the cache
            watch(call)
    pairs = list(zip(watch.us[::2], watch.us[1::2], strict=True))
    return statistics.median(one for one, _ in pairs), statistics.median(other - one for one, other in pairs)


def _pass(shard: LlamaShard, spec: ModelSpec, rows: int, context: int) -> Callable[[], object]:
    """The shard's own pass of the last ``rows`` of ``context`` slots."""
    batch = batch_in_order([0] * rows, context - rows)
    hidden = torch.randn(rows, spec.hidden_size)
    return lambda: [*shard.forward(batch, hidden)]


def _bare(spec: ModelSpec, rows: int, context: int) -> Callable[[], object]:
    """The same layers, bare."""
    size, queries, kv_heads, inner = spec.head_dim, spec.head_count, spec.kv_head_count, spec.intermediate_size
    shapes = [(queries + 2 * kv_heads) * size, spec.hidden_size], [spec.hidden_size, queries * size]
    shapes = *shapes, [2 * inner, spec.hidden_size], [spec.hidden_size, inner]
    weights = [[torch.randn(shape) / shape[1] ** 0.5 for shape in shapes] for _ in range(spec.layer_count)]
    keys, values = torch.randn(2, spec.layer_count, 1, kv_heads, context, size)
    rotations, norm = torch.randn(rows, 1, size // 2, dtype=torch.complex64), torch.ones(spec.hidden_size)
    hidden = torch.randn(rows, spec.hidden_size)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        x = hidden
        for (qkv, output, gate_up, down), key, value in zip(weights, keys, values, strict=True):
            heads = F.linear(F.rms_norm(x, norm.shape, norm, spec.norm_eps), qkv).view(rows, -1, size)
            heads[:, : queries + kv_heads].view(torch.complex64).mul_(rotations)
            query = heads[:, :queries].view(rows, kv_heads, -1, size).transpose(0, 1).reshape(1, kv_heads, -1, size)
            mixed = F.scaled_dot_product_attention(query, key, value)
            x = x + F.linear(mixed.view(kv_heads, rows, -1).transpose(0, 1).reshape(rows, -1), output)
            gate, up = F.linear(F.rms_norm(x, norm.shape, norm, spec.norm_eps), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return x

    return run
