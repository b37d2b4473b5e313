from __future__ import annotations

import random

import numpy as np
import pytest

from pipeinfer.core.links import Link
from pipeinfer.core.messages import Cancel, Cancelled, Message, Row, Run
from pipeinfer.sim.network import Network

RUN = Message(0, 1, Run(1, rows=(Row(1, 2, 3, 4), Row(1, 2, 3, 4))))  # 75 bytes
ADVICE = Message(0, 1, Cancel(rows=(Cancelled(2, 0),)))


def network(link: Link, seed: int = 0) -> Network:
    return Network(link, random.Random(seed))


def test_delay_and_bandwidth_add_up_and_the_wire_is_shared() -> None:
    net = network(Link(delay_s=1.0, bandwidth=77.0))
    assert net.arrivals(0, 1, RUN, None, 10.0) == [12.0]
    assert net.arrivals(0, 1, RUN, None, 10.0) == [13.0]
    assert net.arrivals(1, 0, RUN, None, 10.0) == [12.0], "the other direction has a wire of its own"
    assert net.arrivals(0, 1, RUN, np.zeros(77, np.uint8), 20.0) == [23.0], "activations are 77 bytes more"
    assert (net.messages, net.nbytes) == (4, 5 * 77)


@pytest.mark.parametrize("seed", range(5))
def test_the_stream_never_overtakes_itself(seed: int) -> None:
    net = network(Link(delay_s=0.1, jitter_s=5.0), seed)
    arrivals = [net.arrivals(0, 1, RUN, None, float(now))[0] for now in range(50)]
    assert arrivals == sorted(arrivals)
    assert all(arrival >= now + 0.1 for now, arrival in enumerate(arrivals))


def test_advice_may_overtake() -> None:
    net = network(Link(jitter_s=5.0))
    arrivals = [net.arrivals(0, 1, ADVICE, None, float(now))[0] for now in range(50)]
    assert arrivals != sorted(arrivals)


def test_advice_may_be_lost_or_repeated_but_runs_are_not() -> None:
    lossy, echo = network(Link(control_loss=0.3)), network(Link(control_repeat=0.3))
    lost = sum(not lossy.arrivals(0, 1, ADVICE, None, 0.0) for _ in range(1000))
    repeated = sum(len(echo.arrivals(0, 1, ADVICE, None, 0.0)) == 2 for _ in range(1000))
    assert 250 < lost < 350
    assert 250 < repeated < 350
    assert network(Link(control_loss=1.0)).arrivals(0, 1, ADVICE, None, 0.0) == []
    assert all(len(net.arrivals(0, 1, RUN, None, 0.0)) == 1 for net in (lossy, echo) for _ in range(100))


def test_the_seed_decides() -> None:
    first, second = (network(Link(jitter_s=1.0), seed=3) for _ in range(2))
    assert [first.arrivals(0, 1, RUN, None, 0.0) for _ in range(9)] == [
        second.arrivals(0, 1, RUN, None, 0.0) for _ in range(9)
    ]
