"""The rendezvous leaves nothing behind: its communicator is freed, and the next one may look the same to MPI."""

# ruff: noqa: N802 - MPI names its functions so
from __future__ import annotations

import threading
from collections import defaultdict, deque
from typing import Any

import numpy as np
import pytest

from launch.rendezvous import Rendezvous

Boxes = defaultdict[tuple[int, int], deque[np.ndarray]]


class Done:
    def Test(self) -> bool:
        return True


class Comm:
    """One rank's end of a communicator in memory; ``boxes``: what is under way, by sender and receiver."""

    def __init__(self, rank: int, size: int, boxes: Boxes) -> None:
        self.rank, self.size, self.boxes, self.is_freed = rank, size, boxes, False

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size

    def Isend(self, words: np.ndarray, dest: int) -> Done:
        self.boxes[self.rank, dest].append(words.copy())
        return Done()

    def Iprobe(self, source: int) -> bool:
        return bool(self.boxes[source, self.rank])

    def Recv(self, words: np.ndarray, source: int) -> None:
        words[:] = self.boxes[source, self.rank].popleft()

    def Free(self) -> None:
        self.is_freed = True


def fail(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_message_is_heard_before_the_communicator_goes(size: int) -> None:
    boxes: Boxes = defaultdict(deque)
    comms = [Comm(rank, size, boxes) for rank in range(size)]
    names = [f"rank {rank}" for rank in range(size)]
    all_ranks = [Rendezvous(comm, names, 60.0, False, fail) for comm in comms]
    for rendezvous in all_ranks[::-1]:
        rendezvous.poll()
    threads = [threading.Thread(target=rendezvous.wait, args=(lambda: None,)) for rendezvous in all_ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(comm.is_freed for comm in comms)
    assert not {ends: len(box) for ends, box in boxes.items() if box}
