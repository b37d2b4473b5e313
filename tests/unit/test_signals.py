"""Signals that ask a process of ours to end."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from launch import signals
from pipeinfer.core.errors import Terminated, exit_code, origin

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {signum: signal.signal(signum, signal.SIG_DFL) for signum in SIGNALS}  # nohup ignores some
    yield
    Terminated.raised = None
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", SIGNALS)
def test_the_first_one_ends_the_process_in_order_and_its_echoes_do_not_disturb(signum: signal.Signals) -> None:
    signals.end_in_order()
    with pytest.raises(Terminated) as caught:
        signal.raise_signal(signum)
    assert exit_code(caught.value) == 128 + signum
    signal.raise_signal(signum)
    signal.raise_signal(signal.SIGTERM)


def test_an_error_that_a_library_makes_of_a_signal_is_that_signal() -> None:
    """torch raises a ValueError without a cause where a signal interrupts its look at an object's shape."""
    take_back = signals.end_in_order()
    try:
        signal.raise_signal(signal.SIGTERM)
    except Terminated:
        swallowed = True
    error = ValueError("could not determine the shape")
    assert swallowed
    assert isinstance(origin(error), Terminated)
    take_back()
    assert origin(error) is error


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals.end_in_order()
    signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_program_s_own_handler_stays_and_what_was_taken_is_given_back() -> None:
    def own(*_: object) -> None: ...

    signal.signal(signal.SIGHUP, own)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    take_back = signals.end_in_order()
    assert signal.getsignal(signal.SIGHUP) is own
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    take_back()
    assert signal.getsignal(signal.SIGHUP) is own
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
