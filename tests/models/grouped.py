"""Groups of ranks in one process: a thread is a rank, and plain memory is its window."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.kernels.group import Group, slot_nbytes, window_nbytes
from stages.kernels.library import Library, library
from stages.models.group_shard import Follower, GroupShard
from stages.models.kernel_shard import KernelShard
from tests.models.kernel_bits import World, forgotten

WAIT_S = 60.0
"""Longer than any exchange takes on a busy machine."""


class Threads:
    """A Channel among threads: rank ``rank`` of ``barrier.parties``; ``board`` is where they all write."""

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self._rank, self._barrier, self._board = rank, barrier, board

    def broadcast(self, data: bytes) -> bytes:
        if self._rank == 0:
            self._board[0] = data
        self._barrier.wait(WAIT_S)
        found: bytes = self._board[0]
        self._barrier.wait(WAIT_S)
        return found

    def bring(self, parts: npt.NDArray[Any]) -> None:
        self._board[self._rank] = parts[self._rank].copy()
        self._barrier.wait(WAIT_S)
        for rank, part in enumerate(self._board):
            parts[rank] = part
        self._barrier.wait(WAIT_S)

    def add_up(self, numbers: npt.NDArray[Any]) -> None:
        everybody = np.zeros((self._barrier.parties, *numbers.shape), numbers.dtype)
        everybody[self._rank] = numbers
        self.bring(everybody)
        numbers[...] = everybody.sum(0)


def make_groups(size: int, slot: int, fused: bool, timeout_s: float = WAIT_S, spin_us: int = 50) -> list[Group]:
    """The groups of ``size`` ranks that are threads of this process."""
    lib = library()
    assert lib is not None
    barrier, board = threading.Barrier(size), [None] * size
    windows = [np.zeros(window_nbytes(slot), np.uint8) for _ in range(size)] if fused else []
    names = [f"rank {rank}" for rank in range(size)]
    channels = [Threads(rank, barrier, board) for rank in range(size)]
    return [Group(lib, rank, names, windows, slot, channels[rank], spin_us, timeout_s) for rank in range(size)]


def load_part(world: World, group: Group, spare: int = 60) -> list[KernelShard]:
    """One rank's part of the world's shards."""
    sizes = world.dtype, len(world.tokens) + spare, world.vocabulary
    return forgotten([KernelShard.load(world.spec, world.weights, layers, *sizes, group) for layers in world.cuts])


@contextlib.contextmanager
def grouped(world: World, size: int, fused: bool, two_shot: int | None = None) -> Iterator[Sequence[Any]]:
    """The world's shards on ``size`` ranks, as their leader sees them."""
    groups = make_groups(size, slot_nbytes([world.spec.hidden_size], [world.spec.vocab_size]), fused)
    for group in groups:
        if two_shot is not None:
            group.c.two_shot_floats = two_shot
    shards = [[GroupShard(part, group) for part in load_part(world, group)] for group in groups]
    errors: list[BaseException] = []

    def run(group: Group) -> None:
        try:
            group.follow(Follower(group).handle)
        except BaseException as error:
            errors.append(error)
            for one in groups:
                one.abort()

    threads = [threading.Thread(target=run, args=(group,), daemon=True) for group in groups[1:]]
    for thread in threads:
        thread.start()
    try:
        yield shards[0]
        groups[0].tell("end")
    except BaseException:
        groups[0].abort()
        raise
    finally:
        for thread in threads:
            thread.join(WAIT_S)
    assert not errors, errors


def use(lib: Library, threads: int) -> None:
    """``threads`` threads of the pool that all ranks of this process share."""
    lib.set_threads(threads)
