"""Signals that ask a process of ours to end."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from launch import signals
from pipeinfer.core.errors import Terminated, exit_code

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
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
