"""Ranks that compute one stage together: the memory they share, and what their leader tells them.

The leader, rank 0 of the group, tells the others what to do (``tell``), one command after the other; all then make the
same exchanges in the same order. Exchanges go through a window of each rank that all of them see, fused with the
kernels (native/exchange.h), or by ``bring``, a collective operation, where there is no window or that is asked for.
"""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Callable, Sequence
from ctypes import addressof, c_int32, c_int64, c_uint64, c_void_p
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeinfer.core.errors import StallError
from stages.kernels.library import PANEL, Library

Bytes = npt.NDArray[np.uint8]
MOST_RANKS = 8
MOST_ROWS = 64
"""Rows of an exchange; a pass of more makes several."""
TWO_SHOT = 1 << 15
"""Numbers of an exchange from which on each rank adds up its part only: the others' parts need not be read by all."""
TILES, TILE_NBYTES = 16, 1 << 15
"""Tiles of an exchange, where each has so many bytes of weights at least."""
RING = 1 << 20
"""Bytes of commands that nobody has read yet, at most."""
WRITTEN, READ, DATA, SLOTS = 192, 256, 16384, 4
"""As in native/group.h, and two words for commands: bytes written by the leader, and read by another rank."""
LOOK_US = 50_000
"""Between two looks at signals while waiting."""


class CGroup(ctypes.Structure):
    """``struct group`` of native/group.h."""

    _fields_ = (
        ("rank", c_int32),
        ("size", c_int32),
        ("most_rows", c_int32),
        ("late", c_int32),
        ("spin_ns", c_int64),
        ("most_ns", c_int64),
        ("slot_nbytes", c_int64),
        ("two_shot_floats", c_int64),
        ("epoch", c_uint64),
        ("windows", c_void_p * MOST_RANKS),
    )


class Channel(Protocol):
    """How the leader's commands reach the others where there is no window."""

    def broadcast(self, data: bytes) -> bytes:
        """The leader's ``data``, on every rank. Collective."""
        ...

    def start(self, parts: npt.NDArray[Any], meanwhile: bool = False) -> Any:
        """Begin to bring parts[r] of every rank r to every rank; with ``meanwhile`` while the caller does other things.
        Collective; returns what ``finish`` is to be given."""
        ...

    def finish(self, started: Any) -> None:
        """Wait until those parts are there."""
        ...

    def add_up(self, numbers: npt.NDArray[np.float32]) -> None:
        """The sum over all ranks, in place and in any order. Collective."""
        ...


def slot_nbytes(hidden_sizes: Sequence[int], vocabularies: Sequence[int]) -> int:
    """Bytes of a slot for models of these sizes: rows of an exchange, or a row's logits."""
    rows = 4 * MOST_ROWS * max(-(-hidden // PANEL) * PANEL for hidden in hidden_sizes)
    return -(-max(rows, 4 * max(vocabularies)) // 64) * 64


def window_nbytes(slot: int) -> int:
    """Bytes of a rank's window whose slots have ``slot`` bytes."""
    return DATA + SLOTS * slot + RING


def tile_panels(columns: int, inputs: int, nbytes: int) -> int:
    """Panels of a tile of a linear layer with these sizes, of which each rank has ``inputs`` of ``nbytes`` bytes."""
    panels = -(-columns // PANEL)
    step = max(-(-panels // TILES), TILE_NBYTES // (PANEL * inputs * nbytes))
    return min(panels, -(-step // 4) * 4)


class Group:
    """This rank's side of a group; ``rank`` and ``size`` are within it.

    ``windows``: of every rank, zeroed at first; empty where there are none. ``spin_us``: how long a thread spins while
    it waits. ``timeout_s``: how long a rank may be late before all give up; 0: for ever. ``names``: of the ranks.
    ``is_fused``: whether the next exchanges go through the windows; the leader's commands say it to the others."""

    def __init__(
        self,
        lib: Library,
        rank: int,
        names: Sequence[str],
        windows: Sequence[Bytes],
        slot: int,
        channel: Channel | None = None,
        spin_us: int = 0,
        timeout_s: float = 0.0,
    ) -> None:
        self._lib, self.rank, self.size, self._names = lib, rank, len(names), names
        self._windows, self.channel = windows, channel
        self.can_fuse = self.is_fused = bool(windows)
        self.path = {0: self.is_fused}
        self.parts: list[Any] = []  # this rank's of all shards that the group shares, in the same order on all ranks
        self.exchanges = {"fused": 0, "bulk": 0}
        self.c = CGroup(rank, self.size, MOST_ROWS, 0, 1000 * spin_us, int(1e9 * timeout_s), slot, TWO_SHOT)
        self._timeout_s = timeout_s
        self.on_close: Callable[[], None] | None = None
        for index, window in enumerate(windows):
            self.c.windows[index] = window.ctypes.data
        self._ring = windows[0][DATA + SLOTS * slot :][:RING] if windows else None
        self._under_way: dict[int, Any] = {}  # collectives
        self._moved = 0  # bytes of commands written or read
        self._others = [other for other in range(self.size) if other]

    @property
    def leads(self) -> bool:
        """Whether this rank tells the others what to do."""
        return not self.rank

    def fuses(self, rows: int) -> bool:
        """Whether a pass of ``rows`` rows goes through the windows."""
        known = max((known for known in self.path if known <= rows), default=min(self.path))
        return self.can_fuse and self.path[known]

    @property
    def paths(self) -> str:
        """Which paths exchanges take, in words."""
        taken = {rows: ("bulk", "fused")[is_fused and self.can_fuse] for rows, is_fused in sorted(self.path.items())}
        if len(set(taken.values())) == 1:
            return next(iter(taken.values()))
        return ", ".join(f"{path} from {max(1, rows)} rows on" for rows, path in taken.items())

    @property
    def slot_nbytes(self) -> int:
        """Bytes of a slot."""
        return int(self.c.slot_nbytes)

    def tell(self, command: object) -> None:
        """On the leader: what all others are to do next."""
        data = pickle.dumps(command, protocol=5)
        if self._ring is None:
            assert self.channel is not None
            self.channel.broadcast(data)
            return
        data = len(data).to_bytes(8, "little") + data
        while data:
            room = RING
            for other in self._others:
                read = self._wait(other, READ, max(0, self._moved - RING + 1))
                room = min(room, RING - (self._moved - read))
            start = self._moved % RING
            part = data[: min(room, RING - start)]
            self._ring[start : start + len(part)] = np.frombuffer(part, np.uint8)
            data = data[len(part) :]
            self._moved += len(part)
            self._publish(WRITTEN, self._moved)

    def follow(self, handle: Callable[[Any], bool]) -> None:
        """On the others: do with ``handle`` what the leader says, until that says no."""
        while handle(self.hear()):
            pass

    def hear(self) -> Any:
        """On the others: the leader's next command, whenever it comes."""
        if self._ring is None:
            assert self.channel is not None
            return pickle.loads(self.channel.broadcast(b""))
        return pickle.loads(self._take(int.from_bytes(self._take(8), "little")))

    def _take(self, nbytes: int) -> bytearray:
        assert self._ring is not None
        taken = bytearray()
        while len(taken) < nbytes:
            written = self._wait(0, WRITTEN, self._moved + 1, is_patient=True)
            start = self._moved % RING
            part = self._ring[start : start + min(nbytes - len(taken), written - self._moved, RING - start)]
            taken += part.tobytes()
            self._moved += len(part)
            self._publish(READ, self._moved)
        return taken

    def _publish(self, place: int, value: int) -> None:
        self._lib.binary.pipeinfer_group_publish(addressof(self.c), place, value)

    def _wait(self, rank: int, place: int, least: int, is_patient: bool = False) -> int:
        """The word at ``place`` of the window of ``rank`` once it is ``least`` or more."""
        looks = int(1e6 * self._timeout_s / LOOK_US)
        while code := self._lib.binary.pipeinfer_group_wait(addressof(self.c), rank, place, least, LOOK_US):
            looks -= 1
            if code == 2 and (is_patient or looks > 0 or not self._timeout_s):
                continue
            self.c.late = self.c.late or (1 + rank if code == 2 else 0)
            self.check()
            raise StallError(f"{self._names[self.rank]} was told that the job ends")
        return int(self._windows[rank][place : place + 8].view(np.uint64)[0])

    def bring(self, parts: npt.NDArray[Any]) -> None:
        """In bulk: parts[r] of every rank r, to all ranks."""
        self.start(0, parts)
        self.finish(0)

    def start(self, index: int, parts: npt.NDArray[Any], meanwhile: bool = False) -> None:
        """Begin to bring ``parts`` together, as the ``index``-th of those that are under way; see Channel."""
        assert self.channel is not None
        self.exchanges["bulk"] += 1
        self._under_way[index] = self.channel.start(parts, meanwhile)

    def finish(self, index: int) -> None:
        """Wait for the parts that ``start`` was called with."""
        assert self.channel is not None
        self.channel.finish(self._under_way.pop(index))

    def check(self) -> None:
        """Raise StallError if a rank was late in the exchanges so far."""
        if self.c.late:
            late, mine = self._names[self.c.late - 1], self._names[self.rank]
            raise StallError(f"{mine} waited {self._timeout_s:g} s for {late} of its group (--timeout allows more)")

    def close(self) -> None:
        """Release what the group holds: memory of shards and windows. Collective, after the last command."""
        self.parts.clear()
        if self.on_close is not None:
            self.on_close()

    def abort(self) -> None:
        """End all waits of all ranks in windows, at once and for ever."""
        if self._windows:
            self._lib.binary.pipeinfer_group_abort(addressof(self.c))
