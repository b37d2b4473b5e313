"""Cores that several ranks share: a count, in memory of all of them, of the threads at work there.

Ranks of a pipeline often work in turns: in plain decoding one stage computes at a time. A fixed share of the cores
would leave most of them idle. So each rank has threads for all cores, and the kernels' pool uses the idle ones."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")
MEMORY = Path("/dev/shm")


class Node(Protocol):
    """The ranks of one host; both methods are collective."""

    def allgather(self, value: T) -> list[T]:
        """What every rank gave."""
        ...

    def bcast(self, value: T) -> T:
        """What the first rank gave."""
        ...


def shared_count(node: Node, leads: bool, cores: frozenset[int]) -> mmap.mmap | None:
    """Memory that the ranks of ``node`` share if all of them may run on the same ``cores``: an int32, 0 at first. None
    where they may not, or cannot. ``leads``: this is the first rank. Collective."""
    if len(set(node.allgather(cores))) > 1:
        return None
    path, memory = "", None
    if leads:
        with contextlib.suppress(OSError):
            file, path = tempfile.mkstemp(prefix="pipeinfer-", dir=MEMORY)
            os.write(file, bytes(mmap.PAGESIZE))
            os.close(file)
    path = node.bcast(path)
    if path:
        with contextlib.suppress(OSError, ValueError), open(path, "r+b") as opened:
            memory = mmap.mmap(opened.fileno(), mmap.PAGESIZE)
    have = node.allgather(memory is not None)
    if path and leads:
        os.unlink(path)
    return memory if all(have) else None
