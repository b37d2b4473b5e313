"""Measuring a host or its GPU, as a hardware description: how fast it reads and computes, and what kernels make of it:
ours, or torch's on a GPU and where ours are missing.

Each number is the median of many. Kernels are given what they are given in a shard: one matrix after the other, so that
weights come from memory. All of it together takes a given time: each number gets an equal part of what is left, and
where a machine is slow it is the median of fewer, of fewer matrices or of smaller ones.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from pipeinfer.bench.passes import clock, one_pass, random_model, use_threads, whole_shard
from pipeinfer.core.metrics import percentile
from stages.kernels.library import library

if TYPE_CHECKING:
    import torch

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
FEW_ROWS = (1, 2, 4, 8, 16, 64)
PACKED_ROWS = (1, 2, 4, 8, 16, 32, 128)  # rows times heads that share a key head
KV_HEADS = 8
TINY_LAYERS = 16


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the things are that a device is measured with: more than its caches hold, and long beside a call."""

    part_nbytes: int  # of ten parts that are read
    square: int  # side of a matrix whose product takes long
    matrix: tuple[int, int]
    stream_nbytes: int  # of weights; of keys and values a quarter of that
    context: int
    head_dim: int


PROCESSOR = Sizes(40_000_000, 2048, (4096, 1536), 128_000_000, 1024, 64)
GPU = Sizes(1_000_000_000, 8192, (28672, 8192), 4_000_000_000, 16384, 128)
SECONDS = 30.0
"""For all numbers together; starting ranks, loading torch and measuring links come on top."""
LONGEST_S = 0.4
MOST_TIMES = 1000
LEAST_SQUARE = 128
DTYPES = ("fp32", "bf16")
"""What is measured; shapes that compute in fp16 need a description made by hand."""
FORMATS = {"int8": 128, "int4": 128, "fp6": 128}
"""Quantised weights that our kernels are measured with, and the inputs that share a scale."""
NUMBERS = 1 + len(DTYPES) * (2 + len(ROWS) + len(PACKED_ROWS))


@dataclass(frozen=True, slots=True)
class Clocks:
    """``wall``: what a measurement may take of; ``work``: what computing is timed by. Seconds."""

    wall: Callable[[], float]
    work: Callable[[], float]


def describe(
    cpu: str,
    threads: int,
    link: tuple[float, float],
    device: str = "cpu",
    seconds: float = SECONDS,
    clocks: Clocks | None = None,
) -> str:
    """A description of this host, stages having ``threads`` threads each, or a ``device`` as torch names it; ``link``:
    seconds and bytes per second between ranks. Takes ``seconds``, as far as twice each kernel once allows."""
    import torch

    use_threads(threads)
    with torch.inference_mode():
        return "\n".join(_describe(cpu, threads, link, Probe(device, seconds, clocks)))


def _describe(cpu: str, threads: int, link: tuple[float, float], here: Probe) -> Iterator[str]:
    device = here.device
    asked = "--measure" if device == "cpu" else f"--measure --device {device}"
    by = f"pipeinfer doctor {asked}, {datetime.datetime.now(datetime.UTC).date()}"
    version = f"torch {metadata.version('torch')}"
    sizes = here.sizes
    if device == "cpu":
        cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        yield f'title = "{cpu}, {cores} cores, {threads} to a stage, {version}"\n'
        yield _figure("processor.cores", threads, "threads of each rank", "nominal")
        yield _figure("memory.capacity", memory, "physical memory, as the kernel tells it", "nominal")
    else:
        import torch

        gpu = torch.cuda.get_device_properties(device)
        yield f'title = "{gpu.name}, one to a stage, {version}"\n'
        yield _figure("processor.cores", gpu.multi_processor_count, "multiprocessors, as torch reports them", "nominal")
        yield _figure("memory.capacity", gpu.total_memory, "as torch reports it", "nominal")
    yield _figure("memory.bandwidth", here.read_bandwidth(), f"{by}: sum of {10 * sizes.part_nbytes / 1e6:.0f} MB")
    yield _figure("link.latency", link[0], f"{by}: 8 bytes over MPI, half a round trip")
    yield _figure("link.bandwidth", link[1], f"{by}: 4 MiB over MPI, beyond the latency")
    for dtype in DTYPES:
        peak, square = here.peak(dtype)
        yield _figure(f"{dtype}.peak", peak, f"{by}: product of two {square} x {square} matrices")
        yield _figure(f"{dtype}.overhead", here.overhead_s(dtype), f"{by}: a layer of 64 hidden units")
        matrix = " x ".join(map(str, sizes.matrix))
        weights = f"{by}: up to {sizes.stream_nbytes // 10**6} MB of {matrix} weights in turn"
        yield _curve(f"{dtype}.linear", ROWS, here.linear(dtype), weights)
        source = f"{by}: {sizes.context} slots, {KV_HEADS} key heads of {sizes.head_dim}, layers in turn"
        yield _curve(f"{dtype}.attention", PACKED_ROWS, here.attention(dtype), source)
    for name, group in FORMATS.items() if here.kernels is not None else ():
        if here.is_late():  # on a slow machine; nobody needs these curves
            break
        source = f"{by}: up to {sizes.stream_nbytes // 10**6} MB of {matrix} weights in turn, groups of {group}"
        yield _curve(f"weights.{name}", FEW_ROWS, here.quantized(name, group), source)


def _figure(name: str, value: float, source: str, kind: str = "sustained") -> str:
    return f'[{name}]\nvalue = {_short(value)}\nkind = "{kind}"\nsource = "{source}"\n'


def _curve(name: str, rows: Sequence[int], bandwidth: Sequence[float], source: str) -> str:
    shown = ", ".join(map(_short, bandwidth))
    return f'[{name}]\nrows = {list(rows)}\nbandwidth = [{shown}]\nkind = "sustained"\nsource = "{source}"\n'


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


class Probe:
    """Measures ``device``, as torch names it, within ``seconds``: NUMBERS numbers, and for kernels a few more."""

    def __init__(self, device: str, seconds: float = SECONDS, clocks: Clocks | None = None) -> None:
        import torch

        self.device = device
        self.kernels = library() if device == "cpu" else None
        self.sizes = PROCESSOR if device == "cpu" else GPU
        work = clock(torch.get_num_threads()) if device == "cpu" else time.perf_counter
        self._clocks = clocks or Clocks(time.monotonic, work)
        self._end = self._clocks.wall() + seconds
        self._left = NUMBERS
        if self.kernels is not None:
            self._left += 2 * len(DTYPES) + len(FORMATS) * len(FEW_ROWS)

    def is_late(self) -> bool:
        """Whether the time for all numbers is over."""
        return self._clocks.wall() >= self._end

    def _share_s(self) -> float:
        """Time for the next number."""
        share_s = (self._end - self._clocks.wall()) / max(1, self._left)
        self._left -= 1
        return min(LONGEST_S, share_s)

    def usual_s(self, calls: Sequence[Callable[[], object]]) -> float:
        """The median time of each of ``calls``, summed up; made in turn as often as there is time for. The first one is
        made once before. Where they would take too long only the first few are made, and stand for the others. A
        GPU works on while the processor calls, so there the median time of all in turn."""
        end = self._clocks.wall() + self._share_s()
        if self.device != "cpu":
            calls = [lambda calls=calls: self._finish(calls)]  # type: ignore[misc]
        began = self._clocks.wall()
        calls[0]()
        once_s = max(self._clocks.wall() - began, 1e-9)
        some = calls[: max(1, int((end - self._clocks.wall()) / (3 * once_s)))]
        taken: list[list[float]] = [[] for _ in some]
        while not taken[0] or (self._clocks.wall() < end and len(taken[0]) < MOST_TIMES):
            for call, times in zip(some, taken, strict=True):
                began = self._clocks.work()
                call()
                times.append(self._clocks.work() - began)
        return sum(percentile(times, 0.5) for times in taken) * len(calls) / len(some)

    def _finish(self, calls: Sequence[Callable[[], object]]) -> None:
        import torch

        for call in calls:
            call()
        torch.cuda.synchronize(self.device)

    def read_bandwidth(self) -> float:
        """Bytes per second that the kernels read, or else a sum over fp32 numbers."""
        import torch

        if self.kernels is not None:
            memory = torch.ones(10 * self.sizes.part_nbytes // 4)
            return memory.nbytes / self.usual_s([lambda: self.kernels and self.kernels.read_roof(memory)])
        parts = torch.ones(10, self.sizes.part_nbytes // 4, device=self.device).unbind()
        return 10 * self.sizes.part_nbytes / self.usual_s([part.sum for part in parts])

    def peak(self, dtype: str) -> tuple[float, int]:
        """FLOP/s of the product of two square matrices, and their side: the largest of which there is time for ten."""
        size, wall = LEAST_SQUARE if self.device == "cpu" else self.sizes.square, self._clocks.wall
        most_s = min(LONGEST_S, (self._end - wall()) / max(1, self._left)) / 10
        while True:
            left, right = self._random(dtype, size, size), self._random(dtype, size, size)
            began = wall()
            left @ right
            if size == self.sizes.square or 8 * (wall() - began) > most_s:
                break
            size *= 2
        return float(2 * size**3 / self.usual_s([lambda: left @ right])), size

    def overhead_s(self, dtype: str) -> float:
        """Seconds of a layer that has next to nothing to compute."""
        tiny = random_model(TINY_LAYERS, hidden=64, intermediate=128, heads=4, kv_heads=2, vocab=256)
        shard = whole_shard(tiny, dtype, 16, device=self.device)
        return self.usual_s([one_pass(shard, 1, 16)]) / TINY_LAYERS

    def linear(self, dtype: str) -> list[float]:
        """Bytes of weights per second for each of ROWS."""
        import torch.nn.functional as F

        matrix = self.sizes.matrix
        pair = [self._random(dtype, *size) for size in (matrix, matrix[::-1])]
        nbytes = sum(weight.nbytes for weight in pair)
        weights = [weight.clone() for _ in range(self.sizes.stream_nbytes // nbytes) for weight in pair]
        found = []
        if self.kernels is not None:
            from stages.kernels.linear import Linear

            packed = [Linear.pack(weight) for weight in weights]
        for rows in ROWS:
            x = {width: self._random(dtype, rows, width) for width in matrix}
            calls = [lambda w=weight, x=x[weight.shape[1]]: F.linear(x, w) for weight in weights]
            if self.kernels is not None:
                x = {width: numbers.float() for width, numbers in x.items()}
                calls = [lambda linear=linear, x=x[linear.inputs]: linear(x) for linear in packed]
            found.append(sum(weight.nbytes for weight in weights) / self.usual_s(calls))
        return found

    def quantized(self, name: str, group: int) -> list[float]:
        """Bytes of weights in the format ``name`` per second for each of FEW_ROWS."""
        import torch

        from stages.kernels.linear import Linear
        from stages.quantization.rounding import quantize_matrix

        matrix = self.sizes.matrix
        pair = [quantize_matrix(torch.rand(size), name, group, shares=(1.0,)) for size in (matrix, matrix[::-1])]
        copies = max(1, self.sizes.stream_nbytes // sum(weight.codes.numel() for weight in pair))
        packed = [Linear.pack(weight) for _ in range(copies) for weight in pair]
        found = []
        for rows in FEW_ROWS:
            x = {width: torch.rand(rows, width) for width in matrix}
            calls = [lambda linear=linear, x=x[linear.inputs]: linear(x) for linear in packed]
            found.append(sum(linear.nbytes for linear in packed) / self.usual_s(calls))
        return found

    def attention(self, dtype: str) -> list[float]:
        """Bytes of keys and values per second for each of PACKED_ROWS, as shards on this device compute."""
        import torch
        import torch.nn.functional as F

        context, head_dim = self.sizes.context, self.sizes.head_dim
        if self.kernels is not None:
            return self._kernel_attention(dtype, context, KV_HEADS * head_dim)
        layer = self._random(dtype, 1, 2 * KV_HEADS, context, head_dim)
        layers = [layer.clone() for _ in range(self.sizes.stream_nbytes // 4 // layer.nbytes)]
        found = []
        for rows in PACKED_ROWS:
            shown = max(rows, 2 if dtype == "bf16" else 1)  # as the shard does
            queries = self._random(dtype, 1, KV_HEADS, shown, head_dim)
            mask = torch.zeros(shown, context, dtype=queries.dtype, device=self.device)

            def call(held: torch.Tensor, queries: torch.Tensor = queries, mask: torch.Tensor = mask) -> object:
                return F.scaled_dot_product_attention(queries, held[:, :KV_HEADS], held[:, KV_HEADS:], attn_mask=mask)

            calls = [lambda held=held, call=call: call(held) for held in layers]
            found.append(sum(held.nbytes for held in layers) / self.usual_s(calls))
        return found

    def _kernel_attention(self, dtype: str, context: int, hidden: int) -> list[float]:
        """What passes of a small model take longer with ``context`` slots than with hardly any."""
        spec = random_model(TINY_LAYERS, hidden, intermediate=32, heads=KV_HEADS, kv_heads=KV_HEADS, vocab=256)
        shard = whole_shard(spec, dtype, context)
        nbytes = TINY_LAYERS * 2 * hidden * context * (4 if dtype == "fp32" else 2)
        few, many = PACKED_ROWS[0], PACKED_ROWS[-1]
        least_s, most_s = (self.usual_s([one_pass(shard, rows, rows)]) for rows in (few, many))
        found = []
        for rows in PACKED_ROWS:
            other_s = least_s + (most_s - least_s) * (rows - few) / (many - few)
            found.append(nbytes / max(self.usual_s([one_pass(shard, rows, context)]) - other_s, 1e-9))
        return found

    def _random(self, dtype: str, *shape: int) -> torch.Tensor:
        import torch

        from stages.models.pair import DTYPES as TORCH

        return torch.rand(shape, dtype=TORCH[dtype], device=self.device)
