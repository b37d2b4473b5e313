"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pipeinfer.errors import refuse


def write_whole(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` in UTF-8; whoever reads it meanwhile, or after a crash, finds the old file or the new
    one. Raises UserError where it cannot be written."""
    path = Path(path)
    beside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        refuse(f"{path} cannot be written ({error.strerror})", "name a file in a directory of yours")
