"""Reads parts of files ahead of their use: some threads keep the disk busy as long as there is memory.

What will be read is known as a sequence of *units*, each some extents that are used together (the stored parts of one
matrix). The threads take extents in that order and cut them into chunks, so that one extent is read by several of them.
Whoever uses a unit opens it, reads what it needs and closes it: then its memory is free for what comes later.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.checkpoint.extents import Extent
from stages.weights.files import OpenFile
from stages.weights.memory import BLOCK, Bytes, Region, anonymous, whole

if TYPE_CHECKING:
    import torch

WORKERS = 4
"""Threads that read: a disk needs several requests at a time."""
CHUNK = 4 << 20
"""Bytes of a request."""
MOST_UNITS = 64
"""That are waiting to be used."""


@dataclass(slots=True, eq=False)
class _Piece:
    """An extent that is read: whole blocks from ``begin`` on, ``memory`` once there is some."""

    extent: Extent
    begin: int
    memory: Bytes | None = None
    requested: int = 0  # bytes that threads have begun to read
    done: int = 0
    error: BaseException | None = None

    @classmethod
    def of(cls, extent: Extent) -> _Piece:
        return cls(extent, extent.start // BLOCK * BLOCK)

    @property
    def nbytes(self) -> int:
        """In whole blocks."""
        return whole(self.extent.end - self.begin)

    def has(self, extent: Extent) -> bool:
        mine = self.extent
        return mine.path == extent.path and mine.start <= extent.start and extent.end <= mine.end


@dataclass(slots=True, eq=False)
class _Unit:
    pieces: list[_Piece] = field(default_factory=list)
    is_closed: bool = False


class ReadAhead:
    """A Source for ``units``, with ``nbytes`` of memory. Threads begin with the first ``begin``."""

    def __init__(self, nbytes: int, workers: int = WORKERS) -> None:
        self._changed = threading.Condition()
        self._region = Region(nbytes, self._changed)
        self._units: Iterator[Sequence[Extent]] = iter(())
        self._ahead: deque[_Unit] = deque()  # opened in this order
        self._queue: deque[tuple[_Unit, _Piece]] = deque()  # not requested to their end
        self._open: _Unit | None = None
        self._needed: _Piece | None = None  # what its user waits for
        self._files: dict[Path, OpenFile] = {}
        self._is_over = False
        self._error: BaseException | None = None
        self.nbytes_read = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"pipeinfer reader {index}", daemon=True)
            for index in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, units: Iterator[Sequence[Extent]]) -> None:
        """From now on read ``units``; what was read for others is dropped."""
        with self._changed:
            for unit in (*self._ahead, *([self._open] if self._open else [])):
                unit.is_closed = True
                unit.pieces.clear()
            self._ahead.clear()
            self._queue.clear()
            self._open, self._units = None, units
            self._changed.notify_all()

    @contextmanager
    def unit(self) -> Iterator[None]:
        """Inside the ``with``, the next unit is used. One at a time."""
        with self._changed:
            if not self._ahead:
                self._announce()
            self._open = unit = self._ahead.popleft() if self._ahead else _Unit()
        try:
            yield
        finally:
            with self._changed:
                unit.is_closed = True
                unit.pieces.clear()
                self._open = None
                self._changed.notify_all()

    def read(self, extent: Extent) -> torch.Tensor:
        """See Source. What the open unit does not have is read now."""
        import torch

        with self._changed:
            unit = self._open
            assert unit is not None, "no unit is open"
            piece = next((piece for piece in unit.pieces if piece.has(extent)), None)
            if piece is None:
                piece = _Piece.of(extent)
                unit.pieces.append(piece)
                self._queue.appendleft((unit, piece))
            self._needed = piece
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error or piece.error or piece.done == piece.nbytes or self._is_over)
            self._needed = None
            if (error := self._error or piece.error) is not None:
                raise error
            assert piece.memory is not None and not self._is_over, "reading has ended"
            offset = extent.start - piece.begin
            return torch.from_numpy(piece.memory[offset : offset + extent.nbytes])

    def close(self) -> None:
        """End the threads, after the requests they have begun, and close the files."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        with self._changed:
            while self._files:
                self._files.popitem()[1].close()

    def _work(self) -> None:
        """A thread's life."""
        while True:
            with self._changed:
                try:
                    while (chunk := None if self._is_over else self._next()) is None:
                        if self._is_over:
                            return
                        self._changed.wait()
                except BaseException as error:  # nobody knows what comes next
                    self._error = error
                    self._changed.notify_all()
                    return
            self._read(*chunk)

    def _next(self) -> tuple[_Piece, Bytes, int, int] | None:
        """A piece, memory for its next chunk, where that begins within it, and how many of its bytes there must be;
        None for nothing to read now."""
        while self._queue or (len(self._ahead) < MOST_UNITS and self._announce()):
            unit, piece = self._queue[0]
            if unit.is_closed or piece.error is not None:
                self._queue.popleft()
                continue
            if piece.memory is None:
                piece.memory = self._memory(piece, unit)
                if piece.memory is None:
                    return None
            first, last = piece.requested, min(piece.requested + CHUNK, piece.nbytes)
            piece.requested = last
            if last == piece.nbytes:
                self._queue.popleft()
            end = piece.extent.end - piece.begin
            return piece, piece.memory[first:last], first, min(end, last) - first
        return None

    def _memory(self, piece: _Piece, unit: _Unit) -> Bytes | None:
        """Memory of the region for ``piece``; further memory where its user waits and would wait for ever."""
        memory = self._region.take(piece.nbytes)
        if memory is None and self._needed is not None and unit is self._open:
            memory = np.frombuffer(anonymous(piece.nbytes), np.uint8, piece.nbytes)
        return memory

    def _announce(self) -> bool:
        """Put the next unit's pieces behind those in the queue; whether there is one."""
        extents = next(self._units, None)
        if extents is None:
            return False
        unit = _Unit([_Piece.of(extent) for extent in extents])
        self._queue.extend((unit, piece) for piece in unit.pieces)
        self._ahead.append(unit)
        return True

    def _read(self, piece: _Piece, memory: Bytes, first: int, needed: int) -> None:
        error: BaseException | None = None
        try:
            self._file(piece.extent.path).read(piece.extent, memory, piece.begin + first, needed)
        except BaseException as raised:
            error = raised
        with self._changed:
            piece.done += len(memory)
            piece.error = piece.error or error
            self.nbytes_read += needed
            self._changed.notify_all()

    def _file(self, path: Path) -> OpenFile:
        with self._changed:
            if path not in self._files:
                self._files[path] = OpenFile(path)
            return self._files[path]
