"""Files of weights, open as long as they are streamed, read past the page cache where the file system can do that."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from stages.checkpoint.extents import Extent, refuse_changed, refuse_failed, refuse_short
from stages.weights.memory import BLOCK, Bytes

DIRECT = getattr(os, "O_DIRECT", 0)


class OpenFile:
    """``path``, open for any number of threads. Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._cached = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            refuse_failed(path, 0, error)
        self._direct = self._open_direct()
        self._opened = [self._cached, *([self._direct] if self.is_direct else [])]

    def _open_direct(self) -> int:
        """A descriptor of the same file for reads past the page cache; -1 where there are none."""
        try:
            return os.open(f"/proc/self/fd/{self._cached}", os.O_RDONLY | os.O_CLOEXEC | DIRECT) if DIRECT else -1
        except OSError:  # file systems without it say EINVAL
            return -1

    @property
    def is_direct(self) -> bool:
        """Whether reads go past the page cache."""
        return self._direct >= 0

    def read(self, extent: Extent, memory: Bytes, start: int, needed: int) -> None:
        """Fill ``memory``, whole blocks, from byte ``start`` on, a multiple of the block; at the end of the file it is
        enough to fill the first ``needed`` bytes, those of ``extent``. Raises CheckpointError."""
        done = 0
        while done < needed:
            try:
                direct = self._direct >= 0 and done % BLOCK == 0
                count = os.preadv(self._direct if direct else self._cached, [memory[done:].data], start + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    refuse_failed(self.path, start + done, error)
                self._direct = -1  # larger blocks, perhaps
                continue
            if not count:
                refuse_short(self.path, start + done)
            done += count
        refuse_changed(extent, self._cached)

    def close(self) -> None:
        """Nobody reads any more."""
        for descriptor in self._opened:
            os.close(descriptor)
