"""Measuring this host, as a hardware description: how fast it reads and computes, and what torch's kernels make of it.

Each number is the median of many. Kernels are given what they are given in a shard: one matrix after the other, so that
weights come from memory.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from pipeinfer.bench.passes import clock, one_pass, random_model, whole_shard
from pipeinfer.config import DTYPES
from pipeinfer.metrics import percentile

if TYPE_CHECKING:
    import torch

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
PACKED_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)  # rows times heads that share a key head
MATRIX = (4096, 1536)
STREAM_NBYTES = 128_000_000  # of weights, more than most caches hold; of keys and values a quarter of that
CONTEXT, KV_HEADS, HEAD_DIM = 1024, 8, 64
TINY_LAYERS = 16


def describe(cpu: str, threads: int, link: tuple[float, float]) -> str:
    """A description of this host, stages having ``threads`` threads each; ``link``: seconds and bytes per second
    between ranks. Takes about a minute."""
    import torch

    torch.set_num_threads(threads)
    with torch.inference_mode():
        return "\n".join(_describe(cpu, threads, link))


def _describe(cpu: str, threads: int, link: tuple[float, float]) -> Iterator[str]:
    by = f"pipeinfer doctor --measure, {datetime.datetime.now(datetime.UTC).date()}"
    cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield f'title = "{cpu}, {cores} cores, {threads} to a stage, torch {metadata.version("torch")}"\n'
    yield _figure("processor.cores", threads, "threads of each rank", "nominal")
    yield _figure("memory.capacity", memory, "physical memory, as the kernel tells it", "nominal")
    yield _figure("memory.bandwidth", read_bandwidth(), f"{by}: sum of 400 MB")
    yield _figure("link.latency", link[0], f"{by}: 8 bytes over MPI, half a round trip")
    yield _figure("link.bandwidth", link[1], f"{by}: 4 MiB over MPI, beyond the latency")
    for dtype in DTYPES:
        yield _figure(f"{dtype}.peak", peak(dtype), f"{by}: product of two 2048 x 2048 matrices")
        yield _figure(f"{dtype}.overhead", overhead_s(dtype), f"{by}: a layer of 64 hidden units")
        weights = f"{by}: {STREAM_NBYTES // 10**6} MB of {MATRIX[0]} x {MATRIX[1]} weights in turn"
        yield _curve(f"{dtype}.linear", ROWS, linear(dtype), weights)
        cells = f"{by}: {CONTEXT} cells, {KV_HEADS} key heads of {HEAD_DIM}, layers in turn"
        yield _curve(f"{dtype}.attention", PACKED_ROWS, attention(dtype), cells)


def _figure(name: str, value: float, source: str, kind: str = "sustained") -> str:
    return f'[{name}]\nvalue = {_short(value)}\nkind = "{kind}"\nsource = "{source}"\n'


def _curve(name: str, rows: Sequence[int], bandwidth: Sequence[float], source: str) -> str:
    shown = ", ".join(map(_short, bandwidth))
    return f'[{name}]\nrows = {list(rows)}\nbandwidth = [{shown}]\nkind = "sustained"\nsource = "{source}"\n'


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def usual_s(calls: Sequence[Callable[[], object]], budget_s: float = 0.4) -> float:
    """The median time of each of ``calls``, summed up; made in turn for ``budget_s`` seconds, at least thrice."""
    import torch

    now = clock(torch.get_num_threads())
    taken: list[list[float]] = [[] for _ in calls]
    end = time.monotonic() + budget_s
    while len(taken[0]) < 3 or time.monotonic() < end:
        for call, times in zip(calls, taken, strict=True):
            began = now()
            call()
            times.append(now() - began)
    return sum(percentile(times, 0.5) for times in taken)


def read_bandwidth() -> float:
    """Bytes per second that a sum over fp32 numbers reads."""
    import torch

    parts = torch.ones(10, 10_000_000).unbind()
    return 4e8 / usual_s([part.sum for part in parts])


def peak(dtype: str) -> float:
    """FLOP/s of a large matrix product."""
    left, right = _random(dtype, 2048, 2048), _random(dtype, 2048, 2048)
    return float(2 * 2048**3 / usual_s([lambda: left @ right]))


def overhead_s(dtype: str) -> float:
    """Seconds of a layer that has next to nothing to compute."""
    tiny = random_model(TINY_LAYERS, hidden=64, intermediate=128, heads=4, kv_heads=2, vocab=256)
    return usual_s([one_pass(whole_shard(tiny, dtype, 16), 1, 16)]) / TINY_LAYERS


def linear(dtype: str) -> list[float]:
    """Bytes of weights per second for each of ROWS."""
    import torch.nn.functional as F

    pairs = STREAM_NBYTES // (2 * _random(dtype, *MATRIX).nbytes)
    weights = [_random(dtype, *size) for size in (MATRIX, MATRIX[::-1]) * pairs]
    found = []
    for rows in ROWS:
        x = {width: _random(dtype, rows, width) for width in MATRIX}
        calls = [lambda w=weight, x=x[weight.shape[1]]: F.linear(x, w) for weight in weights]
        found.append(sum(weight.nbytes for weight in weights) / usual_s(calls))
    return found


def attention(dtype: str) -> list[float]:
    """Bytes of keys and values per second for each of PACKED_ROWS, computed as the shard does (see stages.llama)."""
    import torch
    import torch.nn.functional as F

    layer = (1, 2 * KV_HEADS, CONTEXT, HEAD_DIM)
    layers = STREAM_NBYTES // 4 // _random(dtype, *layer).nbytes
    cells = [_random(dtype, *layer) for _ in range(layers)]
    found = []
    for rows in PACKED_ROWS:
        shown = max(rows, 2 if dtype == "bf16" else 1)  # as the shard does
        queries, mask = _random(dtype, 1, KV_HEADS, shown, HEAD_DIM), torch.zeros(shown, CONTEXT, dtype=cells[0].dtype)

        def call(held: torch.Tensor, queries: torch.Tensor = queries, mask: torch.Tensor = mask) -> object:
            return F.scaled_dot_product_attention(queries, held[:, :KV_HEADS], held[:, KV_HEADS:], attn_mask=mask)

        calls = [lambda held=held, call=call: call(held) for held in cells]
        found.append(sum(held.nbytes for held in cells) / usual_s(calls))
    return found


def _random(dtype: str, *shape: int) -> torch.Tensor:
    import torch

    from stages.pair import DTYPES as TORCH

    return torch.rand(shape, dtype=TORCH[dtype])
