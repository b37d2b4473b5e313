"""The group of a rank (``--tp``): ranks that follow each other, whose memory windows MPI makes where they share a host.

It imports no MPI: ``mpi`` is the module mpi4py.MPI, ``world`` the job's communicator."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from launch.backoff import Backoff
from pipeinfer.core.errors import StallError, refuse
from stages.kernels.group import Bytes, Group, window_nbytes
from stages.kernels.library import library

SPIN_US = 1000
"""How long a thread spins that waits for another rank, if each has a core of its own: as long as what the leader does
between two passes."""
MOVE_S = 1e-3
"""Between two tests of collectives whose end nobody waits for yet. Every 0.1 ms takes too much of a core."""
POLLS = 2000
"""Tests of an operation before the first sleep: it mostly ends within microseconds."""


class MpiChannel:
    """The ranks of ``peers``, a communicator that belongs to it; see stages.kernels.group.Channel. ``in_place``: MPI's
    name for a buffer that is both sent and received; ``may_thread``: whether MPI may be called by several threads, one
    at a time."""

    def __init__(
        self, peers: Any, in_place: Any, names: list[str], timeout_s: float, spins: bool, may_thread: bool
    ) -> None:
        self._may_thread, self._moving = may_thread, threading.Lock()
        self._pending: list[Any] = []  # what the second thread moves
        self._mover: threading.Thread | None = None
        self._member, self._in_place = peers.Get_rank(), in_place
        self._peers, self._names, self._timeout_s, self._polls = peers, names, timeout_s, POLLS if spins else 1

    def broadcast(self, data: bytes) -> bytes:
        """See Channel."""
        leads = not self._member
        size = np.array([len(data)], np.int64)
        self._finish(self._peers.Ibcast(size), is_patient=not leads)
        buffer = np.frombuffer(data, np.uint8).copy() if leads else np.empty(int(size[0]), np.uint8)
        self._finish(self._peers.Ibcast(buffer))
        return data if leads else buffer.tobytes()

    def start(self, parts: npt.NDArray[Any], meanwhile: bool = False) -> Any:
        """See Channel. MPI moves data only while it is called, so a second thread calls it in the meantime."""
        mine = parts[self._member].copy()
        with self._moving:
            request = self._peers.Iallgather(mine, parts)
            if meanwhile and self._may_thread:
                self._pending.append(request)
                if self._mover is None:
                    self._mover = threading.Thread(target=self._move, name="pipeinfer collectives", daemon=True)
                    self._mover.start()
        return request, mine

    def finish(self, started: Any) -> None:
        """See Channel."""
        with self._moving:
            self._finish(started[0])
            self._pending = [other for other in self._pending if other is not started[0]]  # MPI's are equal at the end

    def _move(self) -> None:
        """The second thread's life, until nothing is pending: one test at a time, while nobody else calls MPI."""
        while True:
            with self._moving:
                if not self._pending:
                    self._mover = None
                    return
                for request in self._pending:
                    request.Test()
            time.sleep(MOVE_S)

    def add_up(self, numbers: npt.NDArray[np.float32]) -> None:
        """Add up ``numbers`` of all ranks in place, in an order of MPI's own: for benchmarks. Collective."""
        self._finish(self._peers.Iallreduce(self._in_place, numbers))

    def _finish(self, request: Any, is_patient: bool = False) -> None:
        """Wait for ``request``; raise StallError where the others do not come, unless they may take any time."""
        until, backoff = time.monotonic() + self._timeout_s, Backoff()
        while True:
            for _ in range(self._polls):
                if request.Test():
                    return
            if self._timeout_s and not is_patient and time.monotonic() > until:
                mine = self._names[self._member]
                others = ", ".join(name for name in self._names if name != mine)
                raise StallError(f"{mine} waited {self._timeout_s:g} s for {others} of its group")
            backoff.wait()


def make_group(
    world: Any,
    mpi: Any,
    size: int,
    member: int | None,
    slot: int,
    fused: str,
    timeout_s: float,
    spins: bool,
    may_thread: bool,
) -> Group | None:
    """This rank's group of ``size`` ranks; None for a rank in no group, whose ``member`` is None. ``member``: its
    number within the group. ``slot``: see stages.kernels.group.slot_nbytes; ``fused``: see Config. Collective.

    Raises UserError on the first rank where exchanges cannot be fused and are to be."""
    rank = world.Get_rank()
    peers = world.Split(mpi.UNDEFINED if member is None else rank - member, rank)
    lib = library()
    if member is None:
        return None
    assert lib is not None, "groups compute on the kernels"
    node = peers.Split_type(mpi.COMM_TYPE_SHARED)
    share_host = node.Get_size() == size
    node.Free()
    names = [f"rank {rank - member + index}" for index in range(size)]
    if fused == "on" and not share_host and not member:  # the others are ended with the job
        refuse(f"--fused on, but {names[0]} to {names[-1]} are on several hosts", "use --fused auto, or a smaller --tp")
    windows = _Windows(peers, mpi, size, window_nbytes(slot)) if share_host and fused != "off" else None
    channel = MpiChannel(peers, mpi.IN_PLACE, names, timeout_s, spins, may_thread)
    views = windows.views if windows else []
    group = Group(lib, member, names, views, slot, channel, SPIN_US if spins else 0, timeout_s)

    def close() -> None:
        if windows is not None:
            windows.free()
        peers.Free()

    group.on_close = close
    return group


class _Windows:
    """A window of each of the ``size`` ranks of ``peers``, of ``nbytes`` zeroed bytes. Both methods are collective."""

    def __init__(self, peers: Any, mpi: Any, size: int, nbytes: int) -> None:
        self._window = mpi.Win.Allocate_shared(nbytes, 1, comm=peers)
        self.views: list[Bytes] = [np.frombuffer(self._window.Shared_query(rank)[0], np.uint8) for rank in range(size)]
        self.views[peers.Get_rank()][:] = 0
        peers.Barrier()

    def free(self) -> None:
        """No rank uses a view any more."""
        self._window.Free()
