from __future__ import annotations

import gc

import pytest

from launch.collector import paused


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_rests_and_is_then_as_it_was(was_on: bool) -> None:
    if not was_on:
        gc.disable()
    try:
        with pytest.raises(ZeroDivisionError), paused():
            1 / gc.isenabled()
        assert gc.isenabled() is was_on
    finally:
        gc.enable()
