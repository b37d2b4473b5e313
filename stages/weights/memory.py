"""Memory for what is read ahead, as one region that is cut into pieces and never grows."""

from __future__ import annotations

import mmap
import threading
import weakref

import numpy as np
import numpy.typing as npt

BLOCK = 4096
"""Bytes: addresses and sizes of pieces are multiples, as reading past the page cache asks for."""

Bytes = npt.NDArray[np.uint8]


class Region:
    """``nbytes`` bytes. A piece is free again when nothing refers to its array any more; ``changed`` is notified."""

    def __init__(self, nbytes: int, changed: threading.Condition) -> None:
        self._changed = changed
        self._memory = anonymous(nbytes)
        self._free = [(0, len(self._memory))]  # begin and end, in order

    def take(self, nbytes: int) -> Bytes | None:
        """A piece of ``nbytes``, or None if none is so long. To be called with ``changed`` held."""
        need = whole(nbytes)
        for index, (begin, end) in enumerate(self._free):
            if end - begin >= need:
                self._free[index : index + 1] = [(begin + need, end)] if end - begin > need else []
                piece = np.frombuffer(self._memory, np.uint8, nbytes, begin)
                weakref.finalize(piece, self._release, begin, begin + need).atexit = False
                return piece
        return None

    def _release(self, begin: int, end: int) -> None:
        with self._changed:
            pieces = sorted([*self._free, (begin, end)])
            joined = [pieces[0]]
            for first, last in pieces[1:]:
                if first == joined[-1][1]:
                    joined[-1] = joined[-1][0], last
                else:
                    joined.append((first, last))
            self._free = joined
            self._changed.notify_all()


def whole(nbytes: int) -> int:
    """``nbytes`` rounded up to whole blocks."""
    return -(-nbytes // BLOCK) * BLOCK


def anonymous(nbytes: int) -> mmap.mmap:
    """``nbytes`` zeroed bytes, rounded up to whole blocks, from a block's begin on."""
    return mmap.mmap(-1, max(BLOCK, whole(nbytes)))
