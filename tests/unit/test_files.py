"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeinfer.core.errors import UserError
from pipeinfer.core.files import refuse_unwritable, write_whole


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, "old")
    with file.open() as reading:
        write_whole(file, "néw\n")
        assert reading.read() == "old", "who had it open goes on with the old one"
    assert file.read_bytes() == "néw\n".encode()
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in ("file/below", "nowhere/file", "folder", "x" * 300, "/"):
        for write in (lambda path: write_whole(path, "text"), refuse_unwritable):
            with pytest.raises(UserError, match="cannot be written"):
                write(tmp_path / path)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


def test_what_can_be_written_is_not_touched_beforehand(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "old")
    for name in ("file", "new"):
        refuse_unwritable(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"
