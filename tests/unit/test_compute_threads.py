"""How many threads a rank has, and the count of busy cores that ranks share."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import shared_cores
from launch.compute_threads import thread_count
from launch.cores import Cores
from launch.shared_cores import shared_count


class Ranks:
    """Threads that stand for the ranks of a host."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=60)
        self._values: list[Any] = [None] * size

    def node(self, rank: int) -> Any:
        def allgather(value: Any) -> list[Any]:
            self._values[rank] = value
            self._barrier.wait()
            found = list(self._values)
            self._barrier.wait()
            return found

        class Node:
            allgather: Callable[[Any], list[Any]]

            def bcast(self, value: Any) -> Any:
                return allgather(value)[0]

        node = Node()
        node.allgather = allgather
        return node

    def counts(self, cores: list[frozenset[int]]) -> list[Any]:
        found: list[Any] = [None] * len(cores)

        def join(rank: int) -> None:
            found[rank] = shared_count(self.node(rank), rank == 0, cores[rank])

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(len(cores))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found


def test_ranks_of_the_same_cores_share_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_cores, "MEMORY", tmp_path)
    first, second = Ranks(2).counts([frozenset({0, 1})] * 2)
    assert struct.unpack_from("i", first)[0] == 0
    struct.pack_into("i", second, 0, 7)
    assert struct.unpack_from("i", first)[0] == 7
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_ranks_of_other_cores_share_none() -> None:
    assert Ranks(2).counts([frozenset({0}), frozenset({1})]) == [None, None]


def test_no_shared_memory_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_cores, "MEMORY", tmp_path / "missing")
    assert Ranks(3).counts([frozenset({0})] * 3) == [None] * 3


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (shared,) = Ranks(1).counts([frozenset({0})])
    assert thread_count(None, Cores(8, 2, shared), True) == 8, "all cores, if the idle ones can be counted"
    assert thread_count(None, Cores(8, 2, shared), False) == 2
    assert thread_count(None, Cores(8, 2, None), True) == 2
    assert thread_count(5, Cores(8, 2, shared), True) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert thread_count(None, Cores(8, 2, shared), True) == 3
    assert thread_count(4, None, True) == 4
