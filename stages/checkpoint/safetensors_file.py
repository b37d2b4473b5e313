"""The header of a safetensors file (8 bytes of length, then JSON), read with the standard library and checked whole:
a damaged download is refused in milliseconds, before torch is loaded."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stages.checkpoint.folder import AGAIN, refuse, refuse_pointer, refuse_system, said

FLOAT_NBYTES = {"F32": 4, "F16": 2, "BF16": 2}
NBYTES = {
    **FLOAT_NBYTES,
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Bytes of a number of each type whose size is known here."""
MAX_HEADER_NBYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies, and what its file says of it; ``dtype`` in safetensors' spelling, as "BF16". ``name``: its
    name in the file. ``start`` and ``nbytes``: where its bytes lie in a safetensors file; 0 in a pickled one.
    ``state``: size and time of the last change (ns) of that file when its header was read."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    name: str
    start: int = 0
    nbytes: int = 0
    state: tuple[int, int] | None = None


class Place(NamedTuple):
    """A file, where its data begin, and its state; see StoredTensor."""

    path: Path
    data: int
    state: tuple[int, int]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, by the names in it. Raises CheckpointError unless its extents fill it exactly."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            refuse_pointer(path, start)
            if size < 8 or length > min(size - 8, MAX_HEADER_NBYTES):
                refuse(f"{path} is cut short or not a safetensors file ({size} bytes)", AGAIN)
            file.seek(8)
            header = file.read(length)
    except OSError as error:
        refuse_system(path, error)
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_once)
        _check_metadata(entries.pop("__metadata__", {}))
        place = Place(path, 8 + length, (size, status.st_mtime_ns))
        tensors = {name: _stored(place, name, entry) for name, entry in entries.items()}
        end = 8 + length + _end_of(entries)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        refuse(f"{path} has a damaged safetensors header ({said(error)})", AGAIN)
    if size != end:
        state = "cut short" if size < end else "too long"
        refuse(f"{path} is {state}: {size} bytes, its header announces {end}", AGAIN)
    return tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object none of whose keys comes twice."""
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice")
    return content


def _check_metadata(metadata: dict[str, Any]) -> None:
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata that is not text")


def _stored(place: Place, name: str, entry: dict[str, Any]) -> StoredTensor:
    """One header entry of the file at ``place``. Raises ValueError where extent and shape contradict each
    other."""
    if entry.keys() != {"dtype", "shape", "data_offsets"} or not isinstance(entry["dtype"], str):
        raise ValueError(f"no type, shape and extent for {name!r}")
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or not 0 <= number < 1 << 63 for number in (*shape, start, stop)):
        raise ValueError("negative, fractional or endless extent")
    width = NBYTES.get(entry["dtype"])
    if width is not None and stop - start != width * math.prod(shape):
        raise ValueError(f"{stop - start} bytes for shape {list(shape)}")
    return StoredTensor(place.path, entry["dtype"], shape, name, place.data + start, stop - start, place.state)


def _end_of(entries: dict[str, Any]) -> int:
    """Where the last extent ends; raises ValueError unless each begins where the one before it ends."""
    end = 0
    for start, stop in sorted(tuple(entry["data_offsets"]) for entry in entries.values()):
        if start != end or stop < start:
            raise ValueError(f"extents that overlap or leave a hole at {end}")
        end = stop
    return end
