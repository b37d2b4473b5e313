"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from pipeinfer.core.errors import refuse


def write_whole(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8; whoever reads it meanwhile, or after a crash, finds the old file or the new
    one. Raises UserError where it cannot be written."""
    path = Path(path)
    with _beside(path) as beside:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)


def refuse_unwritable(path: str | Path) -> None:
    """Raise UserError where write_whole could not write ``path``: before the work whose result is to go there."""
    path = Path(path)
    with _beside(path) as beside:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        beside.write_bytes(b"\n")
        beside.unlink()


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A name in the directory of ``path``; if writing there fails nothing stays, and a UserError is raised."""
    beside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        yield beside
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        refuse(f"{path} cannot be written ({error.strerror})", "name a file in a directory of yours")
