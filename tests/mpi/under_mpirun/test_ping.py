"""Measuring links between ranks."""

from __future__ import annotations

from typing import Any

import pytest

from launch.mpi import World

TOOK_S = {(1, 1): [4e-6, 9e-6], (2, 1): [6e-6, 8e-6], (1, 64): [5e-3, 7e-3], (2, 64): [4e-3, 4e-3]}
"""Round trips of so many bytes with a peer; those with further peers are the first one's."""


@pytest.mark.mpi(min_size=2)
def test_the_head_knows_half_the_best_round_trip_of_the_slowest_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    real, trips = World._round_trip_s, {pair: iter(times) for pair, times in TOOK_S.items()}

    def told(world: World, peer: int, buffer: Any) -> float:
        assert real(world, peer, buffer) > 0
        return next(trips.get((peer, buffer.nbytes), iter(TOOK_S[1, buffer.nbytes])))

    monkeypatch.setattr(World, "_round_trip_s", told)
    world = World()
    found = world.ping(1, 2), world.ping(64, 2)
    if world.is_head:
        assert found == ((2e-6 if world.size == 2 else 3e-6), 2.5e-3)
    world.close()
