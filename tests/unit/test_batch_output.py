"""The output file of a batch: whole lines whatever happens, and never somebody else's file."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from pipeinfer.cli.batch_lines import OUTPUT_BEGINS, Line, answer_line, error_line
from pipeinfer.cli.batch_output import BatchOutput
from pipeinfer.core.errors import PipeinferError, UserError
from pipeinfer.serve.errors import invalid


def made(custom_id: str) -> bytes:
    return answer_line(Line(1, custom_id, 0), {"text": "\u00e4\n\u2028"})


def test_lines_begin_and_end_as_is_relied_on() -> None:
    for line in (made("a"), error_line(Line(3, "a", 0), invalid("x", "wrong"))):
        assert line.startswith(OUTPUT_BEGINS) and line.endswith(b"\n") and line.count(b"\n") == 1
        assert json.loads(line)["custom_id"] == "a"


def test_every_torn_end_is_cut_off(tmp_path: Path) -> None:
    path, whole, last = tmp_path / "out", made("a") + made("b"), made("c")
    for length in range(len(last)):
        path.write_bytes(whole + last[:length])
        with BatchOutput(path) as output:
            assert output.answered == {"a", "b"}
            output.append(last)
        assert path.read_bytes() == whole + last, length


def test_other_files_are_left_as_they_are(tmp_path: Path) -> None:
    path, not_a_text = tmp_path / "out", b'{"custom_id":1,"response":1}\n'
    for held in (b"x", b"\n", b"[]\n", b'{"custom_id":"a"}\n', made("a") + b"tor", not_a_text):
        path.write_bytes(held)
        with pytest.raises(UserError, match="holds no answers"):
            BatchOutput(path)
        assert path.read_bytes() == held


def test_one_process_writes_a_file(tmp_path: Path) -> None:
    with BatchOutput(tmp_path / "out") as output:
        output.append(made("a"))
        with pytest.raises(UserError, match="being written by another process"):
            BatchOutput(tmp_path / "out")
    with BatchOutput(tmp_path / "out") as output:
        assert output.answered == {"a"}


def test_a_line_that_does_not_fit_leaves_no_part(tmp_path: Path) -> None:
    path, line = tmp_path / "out", made("a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with BatchOutput(path) as output:
        output.append(line)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(line) + 10, before[1]))
        try:
            with pytest.raises(PipeinferError, match="out cannot be written .*the same command goes on"):
                output.append(made("b"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == line


def test_a_new_file_goes_away_if_nothing_was_written(tmp_path: Path) -> None:
    for held in (None, b"", made("a")):
        path = tmp_path / "out"
        if held is not None:
            path.write_bytes(held)
        with pytest.raises(ZeroDivisionError), BatchOutput(path):
            raise ZeroDivisionError
        assert (path.read_bytes() if path.exists() else None) == held
