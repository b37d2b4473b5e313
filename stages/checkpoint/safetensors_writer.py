"""Safetensors files written piece by piece: names and shapes are told first, contents come in any order.

Every file is laid out, and its space on the disk taken, before the first content is written. So a disk that is too
small is known at once, and no tensor has to be in memory whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

NBYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "U8": 1}
"""Of a number, by the dtype in safetensors' spelling."""
SHARD_NBYTES = 4 << 30
"""A file is no larger than this, unless one tensor is."""
ALIGNMENT = 64
"""Where a file's contents begin: at a multiple of so many bytes."""
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""By name: dtype and shape of a tensor."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies: the file's number, its first byte, and the bytes of a row."""

    file: int
    start: int
    row_nbytes: int


class SafetensorsWriter:
    """Writes ``tensors`` into ``folder``: as model.safetensors, or as several files and their index where they are
    larger than ``shard_nbytes`` together. Raises OSError. Use with ``with``."""

    def __init__(self, folder: Path, tensors: Shapes, shard_nbytes: int = SHARD_NBYTES) -> None:
        self.nbytes = sum(_nbytes(*tensor) for tensor in tensors.values())
        """Of all contents."""
        self._places: dict[str, _Place] = {}
        self._files: list[int] = []
        shards = _shards(tensors, shard_nbytes)
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
            _write_index(folder / "model.safetensors.index.json", dict(zip(names, shards, strict=True)), self.nbytes)
        try:
            for name, shard in zip(names, shards, strict=True):
                self._begin(folder / name, shard)
        except BaseException:
            self.close()
            raise

    def _begin(self, path: Path, tensors: Shapes) -> None:
        """Lay out one file: its header, and space for its contents."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        # A reader's window on a number begins at a multiple of its size, and the format has no holes.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda tensor: -NBYTES[tensor[1][0]]):
            start, end = end, end + _nbytes(dtype, shape)
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
            self._places[name] = _Place(len(self._files), start, (end - start) // max(1, shape[0]))
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-(8 + len(header)) % ALIGNMENT)
        start = 8 + len(header)
        for name in tensors:
            place = self._places[name]
            self._places[name] = _Place(place.file, start + place.start, place.row_nbytes)
        self._files.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.posix_fallocate(self._files[-1], 0, start + end)
        _write(self._files[-1], memoryview(len(header).to_bytes(8, "little") + header), 0)

    def write(self, name: str, rows: torch.Tensor, first_row: int = 0) -> None:
        """The rows of tensor ``name`` from ``first_row`` on. Their type is the one that was told."""
        import torch

        place, content = self._places[name], rows.contiguous()
        data: npt.NDArray[np.uint8] = content.view(-1).view(torch.uint8).numpy()
        view = data.data
        assert len(view) == place.row_nbytes * rows.shape[0], (name, rows.shape, rows.dtype)
        _write(self._files[place.file], view, place.start + first_row * place.row_nbytes)

    def finish(self) -> None:
        """Wait until all that was written is on the disk."""
        for file in self._files:
            os.fsync(file)

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return NBYTES[dtype] * math.prod(shape)


def _shards(tensors: Shapes, most: int) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """``tensors`` by file, in their order."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    room = most
    for name, tensor in tensors.items():
        nbytes = _nbytes(*tensor)
        if nbytes > room and shards[-1]:
            shards.append({})
            room = most
        shards[-1][name] = tensor
        room -= nbytes
    return shards


def _write_index(path: Path, shards: Mapping[str, Shapes], nbytes: int) -> None:
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    path.write_text(json.dumps({"metadata": {"total_size": nbytes}, "weight_map": weight_map}, indent=2) + "\n")


def _write(file: int, view: memoryview, start: int) -> None:
    """All of ``view``: one call of the system may write less."""
    while view:
        written = os.pwrite(file, view, start)
        view, start = view[written:], start + written
