"""Measuring links between ranks."""

from __future__ import annotations

import pytest

from launch.mpi import World


@pytest.mark.mpi(min_size=2)
def test_the_head_knows_what_messages_take_and_large_ones_take_longer() -> None:
    world = World()
    small_s, large_s = world.ping(1, 20), world.ping(1 << 24, 3)
    if world.is_head:
        assert 0 < small_s < large_s < 10
    world.close()
