"""The header of a GGUF file, or of several that are one model: metadata, and where each tensor lies.

Read with the standard library, and nothing but the header, so that a damaged download is refused in milliseconds and
before torch is loaded. Every length and count is checked against the file before anything is made of it. Long arrays
(a vocabulary has 300,000 strings) stay in the file until somebody asks for them.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import functools
import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from stages.checkpoint.folder import AGAIN, has_file, printable, refuse, refuse_pointer, refuse_system, shown, status

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_HEADER_NBYTES = 512 << 20
MOST_KEYS, MOST_TENSORS, MOST_PARTS, MOST_NAME = 1 << 16, 1 << 20, 1 << 12, 1 << 16
ALIGNMENTS = tuple(1 << bits for bits in range(3, 21))
FIRST_READ_NBYTES = 1 << 20
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Numbers of the format for types of values, as struct spells them; 8 is text and 9 an array."""
TEXT, ARRAY = 8, 9
BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
}  # fmt: skip
"""Types of tensors that can be read: name, numbers in a block, bytes of a block."""
OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""Names of types that cannot."""
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class LongArray:
    """An array that is left in the file: ``count`` values of the type ``kind`` from the byte ``offset`` on."""

    path: Path
    kind: int
    count: int
    offset: int
    nbytes: int

    def read(self) -> list[Any]:
        """Its values. Raises CheckpointError if the file has changed."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.nbytes)
            if self.kind != TEXT:
                return list(struct.unpack(f"<{self.count}{NUMBERS[self.kind]}", data))
            found, at = [], 0
            for _ in range(self.count):
                end = at + 8 + int.from_bytes(data[at : at + 8], "little")
                found.append(data[at + 8 : end].decode("utf-8", "replace"))
                at = end
            return found
        except OSError as error:
            refuse_system(self.path, error)
        except struct.error:
            refuse(f"{self.path} has changed while it was read", AGAIN)


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies in its file. ``kind``: as in BLOCKS; ``shape``: rows first, inputs of a matrix last.
    ``state``: size and time of the last change (ns) of the file when its header was read."""

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    block: int
    block_nbytes: int
    state: tuple[int, int]

    @property
    def row_nbytes(self) -> int:
        """Bytes of a row."""
        return self.shape[-1] // self.block * self.block_nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape[:-1]) * self.row_nbytes


@dataclass(frozen=True, slots=True, eq=False)
class GGUFFile:
    """What the headers say. ``path``: of the file that names the model, the first part of several; ``state``: its size
    and the time of its last change (ns)."""

    path: Path
    state: tuple[int, int]
    metadata: dict[str, Any] = field(repr=False)
    tensors: dict[str, GGUFTensor] = field(repr=False)

    def values(self, key: str) -> list[Any] | None:
        """The array ``key``; None where there is none. Raises CheckpointError for another value."""
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, LongArray):
            refuse(f"{self.path}: {key} must be an array, not {shown(value)}", AGAIN)
        return value.read()


def read_gguf(path: str | Path) -> GGUFFile:
    """The headers of the model whose file, or whose first file, is ``path``. Raises CheckpointError."""
    path = Path(path)
    if not has_file(path):
        refuse(f"{path}: no such file", "give the path of a GGUF file")
    state, metadata, tensors = _read_part(path)
    parts = metadata.get("split.count", 1)
    named = PART.fullmatch(path.name)
    if type(parts) is not int or not 0 <= parts <= MOST_PARTS:
        refuse(f"{path}: split.count is {shown(parts)}", AGAIN)
    if parts <= 1 and not (named and int(named[3]) > 1):
        return GGUFFile(path, state, metadata, tensors)
    if not named or int(named[3]) != parts:
        refuse(f"{path} is one of {parts} files", "name them as they were: MODEL-00001-of-0000N.gguf")
    if int(named[2]) != 1 or metadata.get("split.no", 0) != 0:
        first = path.with_name(f"{named[1]}-00001-of-{named[3]}.gguf")
        refuse(f"{path} is not the first of {parts} files", f"give {first}")
    tensors = dict(tensors)
    for part in range(2, parts + 1):
        other = path.with_name(f"{named[1]}-{part:05}-of-{named[3]}.gguf")
        if not has_file(other):
            refuse(f"{other} is missing, one of {parts} files", AGAIN)
        more = _read_part(other)[2]
        twice = next(iter(tensors.keys() & more.keys()), None)
        if twice is not None:
            refuse(f"{other}: tensor {printable(twice)} is in another file, too", AGAIN)
        tensors |= more
    wanted = metadata.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        refuse(f"{path} and the files after it have {len(tensors)} tensors, not {shown(wanted)}", AGAIN)
    return GGUFFile(path, state, metadata, tensors)


def _read_part(path: Path) -> tuple[tuple[int, int], dict[str, Any], dict[str, GGUFTensor]]:
    """State, metadata and tensors of one file, none of them to be changed."""
    found = status(path)
    state = (found.st_size, found.st_mtime_ns) if found is not None else (0, 0)
    return state, *_read_once(path, state)


class _ShortError(Exception):
    """The header goes on beyond what has been read of the file."""


@functools.lru_cache(64)
def _read_once(path: Path, _state: tuple[int, int]) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensors of one file; all extents lie within it."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            size = found.st_size
            data = file.read(FIRST_READ_NBYTES)
            _refuse_foreign(path, data)
            while True:
                try:
                    return _Header(path, data, (size, found.st_mtime_ns)).read()
                except _ShortError:
                    if len(data) >= min(size, MOST_HEADER_NBYTES):
                        _damaged(path, f"it ends within its header ({size} bytes)")
                more = file.read(min(7 * len(data), MOST_HEADER_NBYTES - len(data)))
                if not more:
                    _damaged(path, f"it ends within its header ({size} bytes)")
                data += more
    except OSError as error:
        refuse_system(path, error)


def _damaged(path: Path, what: str) -> NoReturn:
    refuse(f"{path} has a damaged GGUF header: {what}", AGAIN)


def _refuse_foreign(path: Path, start: bytes) -> None:
    """Refuse what is no GGUF file of this format."""
    refuse_pointer(path, start[:64])
    if start[:4] != MAGIC:
        refuse(f"{path} is no GGUF file: it begins with {start[:4]!r}", "give a model in GGUF, or a directory")
    version = int.from_bytes(start[4:8], "little")
    if len(start) < 8:
        _damaged(path, "it ends within its header")
    if version & 0xFFFF == 0 and version:
        refuse(f"{path} is a big-endian GGUF file", "convert the model on a little-endian machine")
    if version not in VERSIONS:
        refuse(f"{path} is GGUF version {version}", "convert the model again: versions 2 and 3 are supported")


class _Header:
    """Reads a header from the first bytes ``data`` of the file ``path``, whose size and time are ``state``."""

    def __init__(self, path: Path, data: bytes, state: tuple[int, int]) -> None:
        self._path, self._data, self._state, self._size, self._at = path, data, state, state[0], 8

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        """Metadata and tensors. Raises _ShortError where ``data`` ends too early, CheckpointError where the file is
        wrong."""
        tensors, keys = self._number("Q"), self._number("Q")
        for count, most, nbytes, what in ((tensors, MOST_TENSORS, 24, "tensors"), (keys, MOST_KEYS, 13, "keys")):
            if count > most or count * nbytes > self._size:
                _damaged(self._path, f"{count} {what}")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text("a key", MOST_NAME)
            if key in metadata:
                _damaged(self._path, f"{shown(key)} comes twice")
            metadata[key] = self._value(key)
        infos = [self._info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment not in ALIGNMENTS:
            _damaged(self._path, f"general.alignment is {shown(alignment)}")
        return metadata, self._placed(infos, -(-self._at // alignment) * alignment, alignment)

    def _take(self, nbytes: int) -> int:
        """Where the next ``nbytes`` bytes begin."""
        at = self._at
        if nbytes > self._size - at or at + nbytes > MOST_HEADER_NBYTES:
            _damaged(self._path, f"{nbytes} bytes at {at}, of {self._size}")
        if at + nbytes > len(self._data):
            raise _ShortError
        self._at = at + nbytes
        return at

    def _number(self, kind: str) -> Any:
        return struct.unpack_from(f"<{kind}", self._data, self._take(struct.calcsize(f"<{kind}")))[0]

    def _text(self, what: str, most: int = MOST_HEADER_NBYTES) -> str:
        length = self._number("Q")
        if length > most:
            _damaged(self._path, f"{what} of {length} bytes")
        at = self._take(length)
        return self._data[at : at + length].decode("utf-8", "replace")

    def _value(self, key: str) -> Any:
        kind = self._number("I")
        if kind == TEXT:
            return self._text(printable(key))
        if kind == ARRAY:
            return self._array(key)
        if kind not in NUMBERS:
            _damaged(self._path, f"{shown(key)} has the type {kind}")
        value = self._number(NUMBERS[kind])
        return shortest(value) if kind == 6 else value

    def _array(self, key: str) -> LongArray:
        kind, count = self._number("I"), self._number("Q")
        start = self._at
        if kind == TEXT:
            if count * 8 > self._size:
                _damaged(self._path, f"{shown(key)} has {count} values")
            self._skip_texts(count)
        elif kind in NUMBERS:
            self._take(count * struct.calcsize(f"<{NUMBERS[kind]}"))
        else:
            _damaged(self._path, f"{shown(key)} is an array of the type {kind}")
        return LongArray(self._path, kind, count, start, self._at - start)

    def _skip_texts(self, count: int) -> None:
        """Beyond ``count`` texts; in a loop of its own, as there are hundreds of thousands."""
        data, at, end = self._data, self._at, len(self._data)
        for _ in range(count):
            after = at + 8 + int.from_bytes(data[at : at + 8], "little")
            if after > end:
                self._at = at
                self._take(after - at if end >= at + 8 else 8)  # says what is wrong
            at = after
        self._at = at

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type and offset of a tensor."""
        name, dims = self._text("a tensor's name", MOST_NAME), self._number("I")
        if not 1 <= dims <= 4:
            _damaged(self._path, f"tensor {printable(name)} has {dims} dimensions")
        shape = tuple(self._number("Q") for _ in range(dims))
        if not all(1 <= size < 1 << 40 for size in shape):
            _damaged(self._path, f"tensor {printable(name)} has the shape {shown(list(shape))}")
        return name, shape[::-1], self._number("I"), self._number("Q")

    def _placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, GGUFTensor]:
        """The tensors by name. Raises CheckpointError unless each lies in the file and none on another."""
        found: dict[str, GGUFTensor] = {}
        for name, shape, number, offset in infos:
            if number not in BLOCKS:
                kind = OTHERS.get(number, f"of the unknown type {number}")
                able = ", ".join(name for name, _, _ in BLOCKS.values())
                refuse(f"{self._path}: tensor {printable(name)} is {kind}", f"use a file of the types {able}")
            kind, block, nbytes = BLOCKS[number]
            if shape[-1] % block:
                _damaged(self._path, f"tensor {printable(name)} is {kind} with rows of {shape[-1]}")
            if offset % alignment:
                _damaged(self._path, f"tensor {printable(name)} begins at {offset}, no multiple of {alignment}")
            if name in found:
                _damaged(self._path, f"tensor {printable(name)} comes twice")
            found[name] = GGUFTensor(self._path, name, kind, shape, start + offset, block, nbytes, self._state)
        end = 0
        for tensor in sorted(found.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                _damaged(self._path, f"tensor {printable(tensor.name)} lies on another one")
            end = tensor.offset + tensor.nbytes
        if end > self._size:
            refuse(f"{self._path} is cut short: {self._size} bytes, its header announces {end}", AGAIN)
        return found


def shortest(value: float) -> float:
    """The number with the fewest digits that is ``value`` in float32: 1e-05 for what a file has of 1e-05."""
    if not math.isfinite(value):
        return value
    packed: Callable[[float], bytes] = functools.partial(struct.pack, "<f")
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if abs(short) < 3.4e38 and packed(short) == packed(value):
            return short
    return value
