"""Weights that do not fit into memory: tokens per second beside the disk's, and the time to the first token.

    python -m benchmarks.streamed_weights --target DIR [--share 0.25] [--rows 1,8] [--repeats 3] [--ranks 2]

Three measurements of one model of the Llama family, each with the page cache dropped by posix_fadvise:

  passes      whole passes of one rank with --weights-memory at --share of the files, by rows, in turn with reading the
              same number of bytes past the page cache by as many threads: the ceiling. A pass with r rows yields r
              tokens at most.
  cold start  seconds from opening the files to the first token after a prompt of 16 tokens: everything loaded first,
              everything loaded while the first pass computes, and streamed.
  bytes       what --ranks processes of one host read from the disk together (read_bytes of /proc/PID/io) to load the
              stages of the model, beside the size of its files.

Each process has all cores unless --threads says how many.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from launch.cores import usable_cores
from pipeinfer.core.config import STORED_DTYPES
from pipeinfer.core.slots import batch_in_order
from pipeinfer.placement.roles import split_layers
from stages.checkpoint.checkpoint import Checkpoint
from stages.checkpoint.extents import Extent
from stages.checkpoint.spec import ModelSpec
from stages.kernels.library import library
from stages.models.kernel_shard import KernelShard
from stages.models.pair import DTYPES
from stages.weights.files import OpenFile
from stages.weights.memory import anonymous
from stages.weights.read_ahead import CHUNK, WORKERS

PROMPT = 16


def files(target: Path) -> list[Path]:
    return sorted({stored.path for stored in Checkpoint(target).tensors.values()})


def drop_caches(paths: Sequence[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_rate(paths: Sequence[Path], nbytes: int) -> float:
    """Bytes per second of reading ``nbytes`` of ``paths`` in order, CHUNK by CHUNK, by WORKERS threads."""
    import numpy as np

    drop_caches(paths)
    opened = [(OpenFile(path), path.stat().st_size) for path in paths]
    chunks = ((file, start) for file, size in opened for start in range(0, size - CHUNK + 1, CHUNK))
    left, lock = itertools.islice(chunks, max(1, nbytes // CHUNK)), threading.Lock()
    count = [0]

    def work() -> None:
        memory = np.frombuffer(anonymous(CHUNK), np.uint8)
        while True:
            with lock:
                chunk = next(left, None)
                count[0] += chunk is not None
            if chunk is None:
                return
            file, start = chunk
            file.read(Extent(file.path, start, CHUNK), memory, start, CHUNK)

    threads = [threading.Thread(target=work) for _ in range(WORKERS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = count[0] * CHUNK / (time.perf_counter() - began)
    for file, _ in opened:
        file.close()
    return rate


def run_pass(shard: KernelShard, rows: int, choices: bool = True) -> float:
    """Seconds of a pass."""
    passes, began = shard.forward(batch_in_order([5] * rows, 0), None), time.perf_counter()
    while True:
        try:
            next(passes)
        except StopIteration as done:
            shard.sample(done.value, [rows - 1] if choices else [], 1)
            return time.perf_counter() - began


def load(args: argparse.Namespace, memory: int, layers: range | None = None) -> KernelShard:
    spec, weights = ModelSpec.read(args.target), Checkpoint(args.target)
    dtype = DTYPES[STORED_DTYPES.get(spec.dtype or "", "fp32")]
    every = range(spec.layer_count) if layers is None else layers
    return KernelShard.load(spec, weights, every, dtype, 64, memory=memory)


def read_nbytes() -> int:
    """Bytes that this process has had the disk read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def child(args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: load as ``args.child`` says, and report."""
    how, memory, first, last = args.child.split(":")
    layers = range(int(first), int(last))
    began, before = time.perf_counter(), read_nbytes()
    shard = load(args, int(memory), layers)
    found: dict[str, Any] = {"loaded_s": time.perf_counter() - began}
    if how == "token":
        run_pass(shard, PROMPT)
        found["token_s"] = time.perf_counter() - began
    elif shard._stream is not None:
        shard._stream.wait()
    return {**found, "read_nbytes": read_nbytes() - before}


def children(args: argparse.Namespace, jobs: Sequence[str]) -> list[dict[str, Any]]:
    drop_caches(files(args.target))
    line = [sys.executable, "-m", "benchmarks.streamed_weights", "--target", str(args.target)]
    line += ["--threads", str(args.threads), "--child"]
    running = [subprocess.Popen([*line, job], stdout=subprocess.PIPE, text=True) for job in jobs]
    outputs = [process.communicate()[0] for process in running]
    assert not any(process.returncode for process in running), "a process has failed"
    return [json.loads(output) for output in outputs]


def passes(args: argparse.Namespace, nbytes: int) -> Iterator[str]:
    paths, budget = files(args.target), int(args.share * nbytes)
    shard = load(args, budget)
    stream = shard._stream
    assert stream is not None
    run_pass(shard, 1)
    yield f"asked {budget / 1e6:.0f} MB; resident weights and buffers {shard.weight_nbytes / 1e6:.0f} MB"
    yield "| rows | s a pass | GB read | tokens/s | disk GB/s | tokens/s at the disk's rate | share |"
    yield "|--|--|--|--|--|--|--|"
    for rows in args.rows:
        times, rates, read = list[float](), list[float](), 0.0
        for _ in range(args.repeats):
            rates.append(disk_rate(paths, nbytes))
            run_pass(shard, rows)  # what was read ahead while the disk was measured does not count
            before = stream.nbytes_read
            times += [run_pass(shard, rows) for _ in range(args.passes)]
            read += (stream.nbytes_read - before) / args.passes / args.repeats
        pass_s, rate = statistics.median(times), statistics.median(rates)
        ceiling = rows * rate / read
        yield (
            f"| {rows} | {pass_s:.3f} | {read / 1e9:.2f} | {rows / pass_s:.2f} | {rate / 1e9:.2f} | {ceiling:.2f} | "
            f"{rows / pass_s / ceiling:.2f} |"
        )


def cold_starts(args: argparse.Namespace, nbytes: int) -> Iterator[str]:
    layers = ModelSpec.read(args.target).layer_count
    ways = {"all loaded first": 0, "loaded while the pass computes": 1 << 60, "streamed": int(args.share * nbytes)}
    for name, memory in ways.items():
        found = [children(args, [f"token:{memory}:0:{layers}"])[0] for _ in range(args.repeats)]
        token_s = [one["token_s"] for one in found]
        yield f"first token, {name}: {statistics.median(token_s):.2f} s ({min(token_s):.2f} to {max(token_s):.2f})"


def bytes_read(args: argparse.Namespace, nbytes: int) -> Iterator[str]:
    count = ModelSpec.read(args.target).layer_count
    for name, memory in (("resident", 0), ("loaded in the background", 1 << 60)):
        stages = split_layers(count, [1] * args.ranks)
        found = children(args, [f"load:{memory}:{layers.start}:{layers.stop}" for layers in stages])
        read = sum(one["read_nbytes"] for one in found)
        yield f"{args.ranks} ranks, {name}: {read} bytes read, files {nbytes}: {read / nbytes:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--share", type=float, default=0.25, help="of the files' size, for weights and buffers")
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--passes", type=int, default=3, help="after each measurement of the disk")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    lib = library()
    assert lib is not None, "there is no library of kernels"
    lib.set_threads(args.threads or usable_cores(len(os.sched_getaffinity(0))))
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(child(args)))
        return
    nbytes = sum(path.stat().st_size for path in files(args.target))
    for part in (passes, cold_starts, bytes_read):
        for line in part(args, nbytes):
            print(line, flush=True)


if __name__ == "__main__":
    main()
