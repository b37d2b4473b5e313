"""Memory for packed weights, in large pages where the system has them.

A pass reads every weight once. With pages of 4 KiB the processor looks up a translation every 4 KiB, and reading is a
sixth slower. The system gives large pages only to whole aligned parts of 2 MiB, so tensors lie side by side in chunks.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from stages.kernels.library import Library

PAGE = 2 << 20
CHUNK = 16 * PAGE
"""Bytes of a chunk that several tensors share; larger tensors have chunks of their own."""
LINE = 64


class Arena:
    """Hands out memory that is never written to by others. A chunk is freed with the last tensor in it."""

    def __init__(self) -> None:
        self._chunk: Tensor | None = None
        self._used = 0
        self._lock = threading.Lock()

    def empty(self, lib: Library, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of ``shape``, not initialised, whose first byte begins a cache line: of the thread's Buffer, if it
        has one."""
        nbytes = math.prod(shape) * dtype.itemsize
        buffer: Buffer | None = getattr(_of_thread, "buffer", None)
        if buffer is not None:
            return buffer.take(lib, nbytes).view(dtype).view(*shape)
        if nbytes > CHUNK // 2:
            return _chunk(lib, nbytes)[:nbytes].view(dtype).view(*shape)
        with self._lock:  # several engines of a process may load at a time
            if self._chunk is None or self._used + nbytes > CHUNK:
                self._chunk, self._used = _chunk(lib, CHUNK), 0
            part = self._chunk[self._used : self._used + nbytes]
            self._used += -(-nbytes // LINE) * LINE
        return part.view(dtype).view(*shape)


class Buffer:
    """Memory of ``nbytes`` that is filled again and again. What does not fit gets memory of its own."""

    def __init__(self, lib: Library, nbytes: int) -> None:
        self._memory = _chunk(lib, nbytes)[:nbytes]
        self._used = 0
        self.extra = 0  # bytes that did not fit, the last time

    def empty(self) -> None:
        """Begin anew: nothing that it has given is used any more."""
        self._used = self.extra = 0

    def take(self, lib: Library, nbytes: int) -> Tensor:
        """``nbytes`` bytes from the beginning of a cache line on."""
        first, self._used = self._used, self._used + -(-nbytes // LINE) * LINE
        if first + nbytes <= len(self._memory):
            return self._memory[first : first + nbytes]
        self.extra += nbytes
        return _chunk(lib, nbytes)[:nbytes]


_of_thread = threading.local()


@contextmanager
def packing_into(buffer: Buffer | None) -> Iterator[None]:
    """Inside the ``with``, arenas give this thread memory of ``buffer``, or their own where it is None."""
    before, _of_thread.buffer = getattr(_of_thread, "buffer", None), buffer
    try:
        yield
    finally:
        _of_thread.buffer = before


def _chunk(lib: Library, nbytes: int) -> Tensor:
    """``nbytes`` of memory from the beginning of a page on."""
    memory = torch.empty(max(1, nbytes) + PAGE, dtype=torch.uint8)
    lib.binary.pipeinfer_huge(memory.data_ptr(), memory.nbytes)
    return memory[-memory.data_ptr() % PAGE :]
