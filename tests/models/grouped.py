"""Groups of ranks in one process: a thread is a rank, and plain memory is its window.

``python -m tests.models.grouped --worlds 100`` looks through a hundred random worlds on groups of every size: the bits
of one rank alone, see kernel_bits. With ``--exchanges 100000`` one world goes on for so many exchanges, with passes of
changing sizes, some of them abandoned, and ranks that are late at random."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeinfer.core.slots import batch_in_order
from stages.kernels.group import Group, slot_nbytes, window_nbytes
from stages.kernels.library import Library, library
from stages.models.group_shard import Follower, GroupShard
from stages.models.kernel_shard import KernelShard
from stages.models.split import can_split
from tests.models.kernel_bits import World, check_case, draw_world, forgotten, learn, load, used

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

    def start(self, parts: npt.NDArray[Any], meanwhile: bool = False) -> None:
        self._board[self._rank] = parts[self._rank].copy()
        self._barrier.wait(WAIT_S)
        for rank, part in enumerate(self._board):
            parts[rank] = part
        self._barrier.wait(WAIT_S)

    def finish(self, started: None) -> None:
        pass

    def add_up(self, numbers: npt.NDArray[Any]) -> None:
        everybody = np.zeros((self._barrier.parties, *numbers.shape), numbers.dtype)
        everybody[self._rank] = numbers
        self.start(everybody)
        numbers[...] = everybody.sum(0)


class Whole(GroupShard):
    """What kernel_bits asks of a KernelShard, of all ranks' parts together."""

    def __init__(self, part: KernelShard, group: Group, parts: list[KernelShard]) -> None:
        super().__init__(part, group)
        self.parts = parts

    @property
    def _kv(self) -> Whole:
        return self

    def fill_(self, value: float) -> None:
        for part in self.parts:
            part._kv.fill_(value)

    def choose(self, x: Tensor, draw: Any, count: int) -> Any:
        self._group.tell(("choose", self._index, x.numpy(), [], draw, count))
        return self.parts[0].choose(x, draw, count)


@dataclass(frozen=True, slots=True)
class How:
    """``size`` ranks; ``fused``: by windows. ``two_shot``: numbers from which on an exchange takes two shots."""

    size: int
    fused: bool = True
    two_shot: int | None = None
    timeout_s: float = WAIT_S
    spin_us: int = 50


def make_groups(how: How, slot: int, lib: Library | None = None) -> list[Group]:
    """The groups of ranks that are threads of this process. Windows are full of NaN where nothing else is asked for."""
    lib = lib or library()
    assert lib is not None
    barrier, board = threading.Barrier(how.size), [None] * how.size
    windows = [np.full(window_nbytes(slot), 255, np.uint8) for _ in range(how.size)] if how.fused else []
    for window in windows:
        window[:16384] = 0
    names = [f"rank {rank}" for rank in range(how.size)]
    channels = [Threads(rank, barrier, board) for rank in range(how.size)]
    groups = [
        Group(lib, rank, names, windows, slot, channels[rank], how.spin_us, how.timeout_s) for rank in range(how.size)
    ]
    for group in groups:
        group.c.two_shot_floats = group.c.two_shot_floats if how.two_shot is None else how.two_shot
    return groups


@contextlib.contextmanager
def following(groups: Sequence[Group]) -> Iterator[None]:
    """All but the first of ``groups`` follow, each in a thread, until the end; what fails there is raised here."""
    errors: list[BaseException] = []

    def run(group: Group) -> None:
        try:
            group.follow(Follower(group).handle)
        except BaseException as error:
            errors.append(error)
            groups[0].abort()

    threads = [threading.Thread(target=run, args=(group,), daemon=True) for group in groups[1:]]
    for thread in threads:
        thread.start()
    try:
        yield
        groups[0].tell("end")
    except BaseException:
        groups[0].abort()
        raise
    finally:
        for thread in threads:
            thread.join(WAIT_S)
    assert not errors, errors


@contextlib.contextmanager
def grouped(world: World, how: How, lib: Library | None = None, late_by: random.Random | None = None) -> Iterator[Any]:
    """The world's shards on a group's ranks, as their leader sees them. ``late_by``: see late."""
    groups = make_groups(how, slot_nbytes([world.spec.hidden_size], [world.spec.vocab_size]), lib)
    sizes = world.dtype, len(world.tokens) + 60, world.vocabulary
    with used(lib, world.arithmetic):
        loaded = [
            [KernelShard.load(world.spec, world.weights, layers, *sizes, group) for group in groups]
            for layers in world.cuts
        ]
    shards = []
    for parts in loaded:
        shards.append(Whole(parts[0], groups[0], forgotten(parts)))
        for part, group in zip(parts[1:], groups[1:], strict=True):
            GroupShard(part, group)
    for group in groups[1:] if late_by else ():
        late(group, random.Random(late_by.random()))
    with following(groups):
        yield shards


SIZES = (2, 4, 8)


def check_groups(
    seed: int, lib: Library, cases: int = 2, sizes: Sequence[int] = SIZES, world: World | None = None
) -> int:
    """Raises AssertionError where the bits of a world's rows on a group are not those on one rank. ``world``: if it
    is not the one of ``seed``. Returns how many groups there were."""
    world = world or draw_world(seed, long_texts=seed % 4 == 0)
    dice, count = random.Random(f"groups {seed}"), 0
    sizes = [size for size in sizes if can_split(world.spec, size)]
    if not sizes:
        return 0
    learn(world, load(world, lib), lib, lib.isa)
    for size in sizes:
        for how in (How(size), How(size, two_shot=1), How(size, fused=False)):
            how = How(size, how.fused, how.two_shot, spin_us=dice.choice((0, 50)))
            with grouped(world, how, lib) as shards:
                for case in range(cases):
                    check_case(world, shards, lib, [lib.isa], case)
            count += 1
    return count


def late(group: Group, dice: random.Random) -> None:
    """Make the rank of ``group`` late now and then, before it does what it is told."""
    hear = group.hear

    def hear_late() -> Any:
        command = hear()
        until = time.perf_counter() + (dice.random() * 3e-4 if dice.random() < 0.3 else 0.0)
        while time.perf_counter() < until:
            pass
        return command

    group.hear = hear_late  # type: ignore[method-assign]


def run_pass(shard: Any, batch: Any, hidden: Any, layers: int | None = None) -> Any:
    """What a pass returns; None if it is abandoned after ``layers`` layers."""
    passes = shard.forward(batch, hidden)
    for done in itertools.count():
        if done == layers:
            passes.close()
            return None
        try:
            next(passes)
        except StopIteration as end:
            return end.value


def endure(exchanges: int, size: int, two_shot: int | None, seed: int, lib: Library) -> int:
    """Raises AssertionError for a pass with other bits than on one rank, among so many exchanges. Returns the number of
    passes."""
    dice = random.Random(f"endure {seed}")
    while True:
        world = draw_world(dice.randrange(10**6), long_texts=False)
        if can_split(world.spec, size) and world.cuts == [range(3)] and world.weights.bad is None:
            break
    learn(world, load(world, lib), lib, lib.isa)
    path, passes = max(world.paths, key=len), 0
    truth = torch.stack([world.activations[0][row] for row in path])
    with grouped(world, How(size, two_shot=two_shot), lib, late_by=dice) as (whole,):
        while whole._group.exchanges["fused"] < exchanges:
            lib.set_threads(dice.choice((1, 1, 2)))
            count, passes, left = dice.randint(1, len(path)), passes + 1, dice.choice((None, None, None, 0, 1, 2))
            batch = batch_in_order([world.tokens[row] for row in path[:count]], 0)
            hidden = run_pass(whole, batch, None, left)
            if left is not None:
                continue
            assert torch.equal(hidden, truth[:count]), f"{world}: {count} rows in pass {passes}"
            if dice.random() < 0.3:
                found = whole.sample(hidden, [count - 1], 1)[0]
                assert found == world.said[path[count - 1], "best"], f"{world}: a choice in pass {passes}"
    return passes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--worlds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exchanges", type=int)
    args, lib = parser.parse_args(), library()
    assert lib is not None
    if args.exchanges:
        for size, two_shot in ((2, None), (4, None), (4, 1)):
            passes = endure(args.exchanges, size, two_shot, args.seed, lib)
            print(f"{args.exchanges} exchanges of {size} ranks in {passes} passes: the bits of one rank", flush=True)
        return
    count = sum(check_groups(seed, lib) for seed in range(args.seed, args.seed + args.worlds))
    print(f"{args.worlds} worlds on {count} groups: all bits are those of one rank")


if __name__ == "__main__":
    main()
