"""Doorbells: who is rung wakes at once, who is not sleeps its time, and nobody fails for want of a bell.

A wait of LONG would be the test's hang; one of SHORT ends by itself.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from threading import Timer
from types import SimpleNamespace

import pytest

from launch import doorbell
from launch.doorbell import Doorbell

LONG, SHORT = 3600.0, 0.02


@contextmanager
def pair() -> Iterator[tuple[Doorbell, Doorbell]]:
    here, there = Doorbell(), Doorbell()
    for bell in (here, there):
        bell.meet({0: here.name, 1: there.name})
    with closing(here), closing(there):
        yield here, there


def test_a_ring_before_or_during_the_wait_ends_it() -> None:
    with pair() as (here, there):
        there.ring(0)
        assert here.wait(LONG)
        Timer(0.05, there.ring, (0,)).start()
        assert here.wait(LONG)


def test_many_rings_are_one_and_never_block() -> None:
    with pair() as (here, there):
        for _ in range(5000):
            there.ring(0)
        assert here.wait(LONG)
        assert not here.wait(SHORT), "all of them are forgotten"


def test_nobody_else_is_woken() -> None:
    with pair() as (here, there):
        here.ring(1)
        here.ring(7)
        assert not here.wait(SHORT)
        assert there.wait(LONG)


def test_a_neighbour_that_has_gone_is_no_error() -> None:
    with pair() as (here, there):
        there.close()
        here.ring(1)
        assert not there.wait(SHORT)


def test_without_such_sockets_it_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = list[float]()
    monkeypatch.delattr(socket, "AF_UNIX")
    monkeypatch.setattr(doorbell, "time", SimpleNamespace(sleep=slept.append))
    with pair() as (here, there):
        assert here.name == b""
        there.ring(0)
        assert not here.wait(SHORT)
    assert slept == [SHORT]
