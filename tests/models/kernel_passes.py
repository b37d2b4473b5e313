"""Many passes of a tiny model, as a program: ``python -m tests.models.kernel_passes LIBRARY THREADS SPIN_US PASSES``.

It prints whether all passes left the bits of the first one, which one thread computes. For libraries that may not
survive that, and for what happens when a process ends or forks."""

from __future__ import annotations

import ctypes
import os
import random
import sys

import torch
from torch import Tensor

from pipeinfer.core.slots import batch_in_order
from stages.kernels.library import Library, library
from stages.models.kernel_shard import KernelShard
from tests.models.kernel_bits import draw_world, load, push

WORLD = 1
"""Its model is tiny."""


class Passes:
    """A tiny model on ``lib``, and what one thread computes of passes of 1 to 12 rows."""

    def __init__(self, lib: Library) -> None:
        self.lib, self.world = lib, draw_world(WORLD)
        self.shards: list[KernelShard] = load(self.world, lib)
        lib.set_threads(1)
        self.truths = {rows: self.compute(rows) for rows in range(1, 13)}

    def compute(self, rows: int) -> Tensor:
        tokens = [token % self.world.spec.vocab_size for token in range(7, 7 + rows)]
        return push(self.shards, batch_in_order(tokens))[-1]

    def differ(self, passes: int, seed: int = 0) -> int:
        """How many of so many passes have other bits."""
        dice = random.Random(seed)
        sizes = [dice.randint(1, 12) for _ in range(passes)]
        return sum(not torch.equal(self.compute(rows), self.truths[rows]) for rows in sizes)


def main() -> None:
    path, threads, spin, count, *more = sys.argv[1:]
    lib = Library(ctypes.CDLL(path)) if path != "-" else library()
    assert lib is not None
    torch.set_num_threads(1)
    passes = Passes(lib)
    lib.set_threads(int(threads), int(spin))
    print("different:", passes.differ(int(count)), flush=True)
    if more:  # the child has no helping threads, and computes alone
        child = os.fork()
        if not child:
            os._exit(passes.differ(50) or (more[0] == "threads" and _with_new_threads(passes)))
        print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        print("different:", passes.differ(50), flush=True)


def _with_new_threads(passes: Passes) -> int:
    passes.lib.set_threads(6, 0)
    return passes.differ(50)


if __name__ == "__main__":
    main()
