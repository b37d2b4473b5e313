"""Exit codes, and what a signal led to."""

from __future__ import annotations

import signal

import pytest

from pipeinfer.core.errors import PipeinferError, RankFailed, StallError, Terminated, UserError, exit_code, origin


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), 1),
        (PipeinferError("x"), 1),
        (UserError("x"), 2),
        (StallError("x"), 3),
        (RankFailed("stage 1", 77), 77),
        (KeyboardInterrupt(), 130),
        (Terminated(signal.SIGTERM), 143),
        (Terminated(signal.SIGHUP), 129),
        (SystemExit(), 0),
        (SystemExit(0), 0),
        (SystemExit(7), 7),
        (SystemExit(256 + 7), 7),
        (SystemExit("why"), 1),
    ],
    ids=repr,
)
def test_every_error_has_its_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


class Interrupts:
    def __set_name__(self, owner: type, name: str) -> None:
        raise Terminated(signal.SIGTERM)


def test_a_signal_counts_whatever_it_interrupted() -> None:
    def make_a_class() -> None:
        type("Made", (), {"field": Interrupts()})  # Python 3.11 makes a RuntimeError of it

    def clean_up() -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise OSError("while cleaning up")

    for raises, kind in ((make_a_class, Terminated), (clean_up, KeyboardInterrupt)):
        with pytest.raises(BaseException) as caught:  # noqa: PT011
            raises()
        assert isinstance(origin(caught.value), kind)
    plain = ValueError("x")
    assert origin(plain) is plain
