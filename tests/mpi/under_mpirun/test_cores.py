"""What a rank knows of the cores that it shares."""

from __future__ import annotations

import os

import pytest

from launch.mpi import World


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("cores", [1, 4], ids=["one core each", "four cores each"])
def test_ranks_with_cores_of_their_own_are_spread(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    whole = World()
    mine = set(range(cores * whole.rank, cores * (whole.rank + 1)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: mine)
    monkeypatch.setattr("launch.mpi.usable_cores", lambda affinity: affinity)
    world = World()
    assert (world.threads, world.placement) == (cores, "spread")
    world.close()
    whole.close()


@pytest.mark.mpi(min_size=2)
def test_a_quota_is_shared_like_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    whole = World()
    monkeypatch.setattr("launch.mpi.usable_cores", lambda affinity: whole.size)
    world = World()
    assert (world.cores.fair, world.placement) == (1, "spread")
    world.close()
    whole.close()


@pytest.mark.mpi(min_size=2)
def test_all_know_whether_every_rank_has_the_kernel_library(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, forgone = World(), list[str]()
    monkeypatch.setattr("launch.mpi.forgo", forgone.append)
    for having, expected in (({0}, False), (set(range(whole.size)), True), (set[int](), False)):
        found = object() if whole.rank in having else None
        monkeypatch.setattr("launch.mpi.library", lambda found=found: found)
        world = World()
        assert world.has_kernels is expected
        assert bool(forgone) == (not expected and found is not None), "who has it does without"
        forgone.clear()
        world.close()
    whole.close()


@pytest.mark.mpi(min_size=2)
def test_all_know_that_some_are_oversubscribed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = World()
    mine = {0} if whole.rank < 2 else {whole.rank}  # two ranks on one core, the others alone
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: mine)
    monkeypatch.setattr("launch.mpi.usable_cores", lambda affinity: affinity)
    world = World()
    assert world.placement == "oversubscribed"
    world.close()
    whole.close()
