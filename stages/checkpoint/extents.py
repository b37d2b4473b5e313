"""Parts of files, read into memory by pread: a file that ends early or a disk that fails is an error with an offset,
not a signal, and no memory is mapped.

A thread may have its reads done by another source, for instance one that has read ahead (see stages/weights).
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from stages.checkpoint.folder import AGAIN, refuse
from stages.checkpoint.safetensors_file import StoredTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes of the file ``path`` from byte ``start`` on. ``state``: size and time of the last change (ns)
    that the file is to have; None for any."""

    path: Path
    start: int
    nbytes: int
    state: tuple[int, int] | None = None

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.nbytes


class Source(Protocol):
    """Reads extents."""

    def read(self, extent: Extent) -> torch.Tensor:
        """The bytes: uint8 [nbytes]. Raises CheckpointError."""
        ...


_of_thread = threading.local()


@contextmanager
def reading_through(source: Source) -> Iterator[None]:
    """Inside the ``with``, this thread's read_extent asks ``source``."""
    before, _of_thread.source = getattr(_of_thread, "source", None), source
    try:
        yield
    finally:
        _of_thread.source = before


def read_extent(extent: Extent) -> torch.Tensor:
    """The bytes of ``extent``, uint8 [nbytes], in memory that nothing else uses. Raises CheckpointError."""
    source: Source | None = getattr(_of_thread, "source", None)
    return plain_read(extent) if source is None else source.read(extent)


def is_redirected() -> bool:
    """Whether this thread's reads are done by another source."""
    return getattr(_of_thread, "source", None) is not None


def plain_read(extent: Extent) -> torch.Tensor:
    """As read_extent, by the calling thread and through the page cache."""
    return read_strided(extent, extent.nbytes, 0, extent.nbytes)[0]


def read_strided(extent: Extent, stride: int, skipped: int, nbytes: int) -> torch.Tensor:
    """Of every ``stride`` bytes of ``extent`` the ``nbytes`` behind the first ``skipped``: uint8 [rows, nbytes], by the
    calling thread and through the page cache. Raises CheckpointError."""
    import torch

    rows = extent.nbytes // stride if stride else 1
    found = torch.empty((rows, nbytes), dtype=torch.uint8)
    at = extent.start
    try:
        with extent.path.open("rb", buffering=0) as file:
            for row, memory in enumerate(found.numpy()):
                begin, done = extent.start + row * stride + skipped, 0
                while done < nbytes:
                    at = begin + done
                    count = os.preadv(file.fileno(), [memory[done:].data], at)
                    if not count:
                        refuse_short(extent.path, at)
                    done += count
            refuse_changed(extent, file.fileno())
    except OSError as error:
        refuse_failed(extent.path, at, error)
    return found


def refuse_changed(extent: Extent, descriptor: int) -> None:
    """Raise CheckpointError if the file of ``extent``, open as ``descriptor``, is not as it was."""
    status = os.fstat(descriptor)
    if extent.state not in (None, (status.st_size, status.st_mtime_ns)):
        refuse(f"{extent.path} was changed before it was read at byte {extent.start}", AGAIN)


def refuse_short(path: Path, offset: int) -> NoReturn:
    """``path`` ends before ``offset``, where its header has numbers."""
    refuse(f"{path} ends before byte {offset}, in the middle of a tensor: it was cut short or replaced", AGAIN)


def refuse_failed(path: Path, offset: int, error: OSError) -> NoReturn:
    """The system could not read ``path`` at ``offset``."""
    reason = error.strerror or type(error).__name__
    refuse(f"{path} cannot be read at byte {offset} ({reason})", "check the disk or the network file system")


class TensorWindow:
    """A tensor of a safetensors file; ``window[parts]`` reads it, or the part that slices name, into memory of its
    own."""

    def __init__(self, stored: StoredTensor) -> None:
        self._stored = stored

    def __getitem__(self, parts: Any) -> torch.Tensor:
        stored = self._stored
        dtype = torch_dtype(stored.dtype)
        extent, shape = extent_of(stored, parts)
        found = read_extent(extent)
        if found.data_ptr() % dtype.itemsize:  # a header of odd length
            found = found.clone()
        rest = () if parts is ... else parts if isinstance(parts, tuple) else (parts,)
        tensor = found.view(dtype).view(shape)
        return tensor[(slice(None), *rest[1:])] if len(rest) > 1 else tensor


def extent_of(stored: StoredTensor, parts: Any = ...) -> tuple[Extent, tuple[int, ...]]:
    """Where what ``parts`` name of ``stored`` lies, and its shape: whole rows, all that the first slice names."""
    rows = parts[0] if isinstance(parts, tuple) and parts else parts
    if not isinstance(rows, slice) or not stored.shape:
        return Extent(stored.path, stored.start, stored.nbytes, stored.state), stored.shape
    start, stop, _ = rows.indices(stored.shape[0])
    count, each = max(0, stop - start), stored.nbytes // max(1, stored.shape[0])
    return Extent(stored.path, stored.start + start * each, count * each, stored.state), (count, *stored.shape[1:])


@functools.cache
def torch_dtype(name: str) -> torch.dtype:
    """The type that safetensors spells ``name``. Raises ValueError for an unknown one."""
    import torch

    names = {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
        "BOOL": "bool",
    }  # fmt: skip
    if name not in names:
        raise ValueError(f"a tensor of type {name}")
    found: torch.dtype = getattr(torch, names[name])
    return found
