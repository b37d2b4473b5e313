"""Doorbells: who is rung wakes at once, who is not sleeps its time, and nobody fails for want of a bell."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from threading import Timer

import pytest

from launch.doorbell import Doorbell


@contextmanager
def pair() -> Iterator[tuple[Doorbell, Doorbell]]:
    here, there = Doorbell(), Doorbell()
    for bell in (here, there):
        bell.meet({0: here.name, 1: there.name})
    with closing(here), closing(there):
        yield here, there


def waited_s(bell: Doorbell, most_s: float) -> float:
    began = time.monotonic()
    bell.wait(most_s)
    return time.monotonic() - began


def test_a_ring_before_or_during_the_wait_ends_it() -> None:
    with pair() as (here, there):
        there.ring(0)
        assert waited_s(here, 20.0) < 10.0
        Timer(0.05, there.ring, (0,)).start()
        assert waited_s(here, 20.0) < 10.0


def test_many_rings_are_one_and_never_block() -> None:
    with pair() as (here, there):
        for _ in range(5000):
            there.ring(0)
        assert waited_s(here, 20.0) < 10.0
        assert waited_s(here, 0.02) >= 0.02, "all of them are forgotten"


def test_nobody_else_is_woken() -> None:
    with pair() as (here, there):
        here.ring(1)
        here.ring(7)
        assert waited_s(here, 0.02) >= 0.02
        assert waited_s(there, 20.0) < 10.0


def test_a_neighbour_that_has_gone_is_no_error() -> None:
    with pair() as (here, there):
        there.close()
        here.ring(1)
        assert waited_s(there, 0.02) >= 0.02


def test_without_such_sockets_it_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with pair() as (here, there):
        assert here.name == b""
        there.ring(0)
        assert waited_s(here, 0.02) >= 0.02
