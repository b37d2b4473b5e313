"""The job's MPI: the only file that imports it. Messages between ranks are in launch/transport.py."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import mpi4py
import numpy as np
import numpy.typing as npt

mpi4py.rc.thread_level = "serialized"  # several threads, one at a time; must be set before MPI is loaded

from mpi4py import MPI  # noqa: E402

from launch import transport  # noqa: E402
from launch.backoff import LONGEST_S  # noqa: E402
from launch.compute_threads import thread_count  # noqa: E402
from launch.cores import Cores, usable_cores  # noqa: E402
from launch.failure import report  # noqa: E402
from launch.groups import make_group  # noqa: E402
from launch.rendezvous import Rendezvous  # noqa: E402
from launch.shared_cores import shared_count  # noqa: E402
from launch.signals import end_undisturbed  # noqa: E402
from launch.transport import politely  # noqa: E402
from launch.watch import here, name_of  # noqa: E402
from pipeinfer.core.errors import exit_code, origin  # noqa: E402
from speculation.schedules.schedule import Placement  # noqa: E402
from stages.kernels.group import Group  # noqa: E402
from stages.kernels.library import forgo, library  # noqa: E402

Bytes = npt.NDArray[np.uint8]
MpiTransport = functools.partial(transport.MpiTransport, mpi=MPI)
"""The transport over this process's MPI."""
REST_S = 10e-3
OVERSUBSCRIBED = 1.25
"""More ranks per core than this slow each other down; a few more ranks than cores do not."""


def abort(code: int) -> None:
    """End every rank of the MPI job that this process is part of, now, with exit code ``code``; where it is alone, or
    MPI is not running, nothing happens."""
    if MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.Get_size() > 1:
        MPI.COMM_WORLD.Abort(code)


def _share_of_cores(node: MPI.Comm) -> Cores:
    """The cores of this rank, one of the ranks of a host, ``node``. Collective."""
    mine = os.sched_getaffinity(0)
    sharers = sum(not mine.isdisjoint(others) for others in node.allgather(mine))
    count = usable_cores(len(mine))
    busy = shared_count(node, node.Get_rank() == 0, frozenset(mine)) if node.Get_size() > 1 else None
    return Cores(count, max(1, count // sharers), busy, sharers)


class World:
    """The job this process is part of: its own duplicate of MPI_COMM_WORLD or of a communicator it was given."""

    has_failed = False  # this process, whichever world it failed in
    _failing = threading.Lock()

    def __init__(self, comm: MPI.Intracomm | None = None) -> None:
        """``node``: the ranks of this host; ``threads``: see thread_count, until a job asks for another number;
        ``cores``: those that this rank may use; ``placement``: what processors ranks have; ``may_thread``: whether MPI
        may be called by another thread than the one that opened it, one at a time; ``has_kernels``: whether all ranks
        have the library."""
        # Few collectives: they spin, and where ranks are more than cores they take most of the time of opening.
        self.comm = (comm or MPI.COMM_WORLD).Dup()
        self.node = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.rank = self.comm.Get_rank()
        self.size = self.comm.Get_size()
        self.cores = _share_of_cores(self.node)
        is_oversubscribed = self.cores.sharers > OVERSUBSCRIBED * self.cores.count
        mine = (here(), MPI.Query_thread() >= MPI.THREAD_SERIALIZED, library() is not None, is_oversubscribed)
        places, may_thread, has_kernels, oversubscribed = zip(*self.comm.allgather(mine), strict=True)
        self.may_thread, self.has_kernels = all(may_thread), all(has_kernels)
        self._names = [name_of(rank, *where) for rank, where in enumerate(places)]
        if not self.has_kernels and library() is not None:
            forgo("another rank has no library of decode kernels")
        self.threads = thread_count(None, self.cores, self.has_kernels)
        # Others may use the cores too, unless ranks are bound.
        shared: Placement = "oversubscribed" if any(oversubscribed) else "spread"
        self.placement: Placement = shared if self.size > 1 else "alone"
        # Called with the exit code after a failure is reported and before all ranks are ended.
        self.before_abort: Callable[[int], None] | None = None

    def group(self, size: int, member: int | None, slot: int, fused: str, timeout_s: float) -> Group | None:
        """This rank's group: see make_group. Collective."""
        spins = self.cores.sharers <= self.cores.count
        return make_group(self.comm, MPI, size, member, slot, fused, timeout_s, spins, self.may_thread)

    def rendezvous(self, timeout_s: float) -> Rendezvous:
        """Watch the ranks from now until all are ready. Collective."""
        return Rendezvous(self.comm.Dup(), self._names, timeout_s, self.may_thread, self.fail)

    @property
    def is_head(self) -> bool:
        """Whether this rank leads."""
        return self.rank == 0

    def agree(self, verdict: int, meanwhile: Callable[[], object] = int) -> int:
        """The head's ``verdict``, on every rank; who waits for it calls ``meanwhile`` now and then."""
        number = np.array([verdict], np.int64)
        politely(self.comm.Ibcast(number), meanwhile, long_s=LONGEST_S)  # ranks that load need the cores
        return int(number[0])

    def slowest(self, seconds: float) -> float:
        """The largest number of all ranks. Collective; nobody sleeps meanwhile."""
        found: float = self.comm.allreduce(seconds, MPI.MAX)
        return found

    def meet(self, meanwhile: Callable[[], object]) -> None:
        """Wait until all ranks are here, and call ``meanwhile`` now and then."""
        politely(self.comm.Ibarrier(), meanwhile)

    def rest(self) -> None:
        """Wait for ranks that still work; poll only every few milliseconds, to leave the cores to them."""
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(REST_S)

    def broadcast(self, message: dict[str, Any]) -> dict[str, Any]:
        """The head's ``message`` (JSON), on every rank."""
        text = np.frombuffer(json.dumps(message).encode(), np.uint8).copy()
        if (size := self.agree(text.size)) != text.size:
            text = np.empty(size, np.uint8)
        politely(self.comm.Ibcast(text))
        found: dict[str, Any] = json.loads(bytes(text))
        return found

    @property
    def library(self) -> str:
        """The MPI library's version string."""
        return MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0 ")

    @contextlib.contextmanager
    def part(self, ranks: int) -> Iterator[World | None]:
        """The first ``ranks`` ranks as a world of their own; the others get None, and wait at the end. Collective."""
        comm = self.comm.Split(int(self.rank >= ranks), self.rank)
        assert isinstance(comm, MPI.Intracomm)
        world = World(comm)
        comm.Free()
        yield world if self.rank < ranks else None
        world.close()
        self.rest()

    def gather(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's ``facts`` (JSON), on the head; elsewhere an empty list."""
        text = json.dumps(facts).encode()
        sizes = np.empty(self.size, np.int64)
        politely(self.comm.Iallgather(np.array([len(text)], np.int64), sizes), long_s=LONGEST_S)
        mine = np.zeros(sizes.max(), np.uint8)
        mine[: len(text)] = np.frombuffer(text, np.uint8)
        everybody = np.empty((self.size, len(mine)), np.uint8)
        politely(self.comm.Igather(mine, everybody))
        rows = zip(everybody, sizes, strict=True) if self.is_head else ()
        return [json.loads(bytes(row[:size])) for row, size in rows]

    def ping(self, nbytes: int, repeats: int) -> float:
        """Seconds one way for a message of ``nbytes`` between the head and another rank: half the best of ``repeats``
        round trips, of the slowest such pair; for the head to know. Collective; nobody sleeps between polls here."""
        slowest_s = 0.0
        for peer in range(1, self.size):
            if self.rank in (0, peer):
                trips = [self._round_trip_s(peer, np.zeros(nbytes, np.uint8)) for _ in range(repeats)]
                slowest_s = max(slowest_s, min(trips) / 2)
            politely(self.comm.Ibarrier())
        return slowest_s

    def _round_trip_s(self, peer: int, buffer: Bytes) -> float:
        began = time.perf_counter()
        turns = (self.comm.Isend, self.comm.Irecv)
        for post in turns if self.is_head else turns[::-1]:
            request = post([buffer, MPI.BYTE], peer if self.is_head else 0)
            while not request.Test():
                pass
        return time.perf_counter() - began

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Whatever is raised inside the ``with`` ends all ranks: see fail."""
        try:
            yield
        except BaseException as error:
            self.fail(error)

    def abort(self, code: int) -> None:
        """End all ranks now."""
        abort(code)

    def fail(self, error: BaseException) -> NoReturn:
        """Report the error and end every rank of the job now; only the first calling thread reports."""
        error = origin(error)
        code = exit_code(error) or 1
        World.has_failed = True
        end_undisturbed()  # the launcher may be ending this rank for another one meanwhile
        if self._failing.acquire(blocking=False):
            report(error, self.rank)
            if self.before_abort is not None:
                with contextlib.suppress(Exception):  # what has failed may fail again
                    self.before_abort(code)
            self.abort(code)
        raise SystemExit(code)

    def close(self) -> None:
        """Free the communicators. Collective."""
        self.node.Free()
        self.comm.Free()

    @staticmethod
    def end_mpi() -> None:
        """End MPI in this process, which calls it no more. Collective. mpi4py does it where Python ends by itself."""
        MPI.Finalize()
