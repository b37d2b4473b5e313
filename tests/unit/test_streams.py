"""Standard output and error as the command line makes them, on descriptors of our own."""

from __future__ import annotations

import os
import threading

import pytest

from pipeinfer.cli.streams import OutputError, _Errors, _in_utf8, _Output
from pipeinfer.core.errors import exit_code


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def left() -> int:
    source, sink = os.pipe()
    os.close(source)
    return sink


@pytest.mark.parametrize(("opened", "code"), [(full, 1), (left, 141)])
def test_output_that_fails_says_so_by_its_own_error(opened: object, code: int) -> None:
    descriptor = opened()  # type: ignore[operator]
    stream = _in_utf8(_Output(descriptor, "w", closefd=False), line_buffering=False)
    stream.write("text")
    with pytest.raises(OutputError) as caught:
        stream.flush()
    assert exit_code(caught.value) == code and caught.value.is_told == (code == 141)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    stream.close()  # what it still holds goes nowhere, without another word
    os.close(null)
    os.close(descriptor)


@pytest.mark.parametrize("opened", [full, left])
def test_errors_that_cannot_be_told_raise_nothing(opened: object) -> None:
    with _in_utf8(_Errors(opened(), "w"), line_buffering=True) as stream:  # type: ignore[operator]
        assert stream.write("why\n") == 4


def test_any_text_goes_out_in_utf8_and_a_pipe_that_does_not_wait_is_waited_for() -> None:
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    said = "ä\ud800" + "x" * (1 << 20)  # more than a pipe holds
    heard = bytearray()

    def read() -> None:
        while piece := os.read(source, 1 << 16):
            heard.extend(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with _in_utf8(_Output(sink, "w"), line_buffering=False) as stream:
        stream.write(said)
    reader.join()
    os.close(source)
    assert heard == b"\xc3\xa4\\ud800" + b"x" * (1 << 20)
