"""The MPI transport: the only file that speaks MPI.

Theory of operation. The job's communicator is duplicated twice, so that nothing of ours can match anything of anybody
else's.

    messages  a ring of pre-posted receives from any source. MPI matches them in posting order and keeps the order of
              each sender, so taking them in ring order keeps it too. STREAM and CONTROL share it: one test says that
              there is nothing new, and that is what is asked most often. A tensor that fits into the same buffer comes
              behind its message.
    tensors   for larger ones. No receive is posted until a message announces one; then it is, from that sender. Both
              sides count alike, so the n-th tensor meets the n-th announcement.

Everything is non-blocking. A message whose tensor has not arrived holds back the later ones of its sender only, and no
CONTROL. Sends are kept, buffers and all, until MPI is done with them. Large tensors land in a fixed rotation of
buffers: as a run is one of at most ``window`` in flight, its buffer is free again before its turn comes round.

Nobody spins: who has nothing to do sleeps until a neighbour rings (see Doorbell) or between polls (see Backoff). So
many ranks can share few cores, and a blocking MPI call that would burn one never appears.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import mpi4py
import numpy as np
import numpy.typing as npt

mpi4py.rc.thread_level = "serialized"  # several threads, one at a time; must be said before MPI is loaded

from mpi4py import MPI  # noqa: E402

from launch.backoff import Backoff  # noqa: E402
from launch.doorbell import Doorbell  # noqa: E402
from launch.failure import say  # noqa: E402
from launch.muster import Muster  # noqa: E402
from launch.watch import here, name_of  # noqa: E402
from pipeinfer.errors import LocalProtocolError, exit_code  # noqa: E402
from pipeinfer.ports import Payload, Received  # noqa: E402
from pipeinfer.protocol import MAX_NBYTES, Message, decode, encode, wire_nbytes  # noqa: E402
from speculation.schedule import Placement  # noqa: E402

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
RING = 8
MOST_PENDING_SENDS = 4096
REST_S = 10e-3
OVERSUBSCRIBED = 1.25
"""So many ranks for each core take each other's time; a few more than cores do not."""
IDLE_S = 4e-3
"""So soon somebody who was rung for looks up again, then after four times as long, and so on."""


@dataclass(slots=True)
class _Inbound:
    message: Message
    buffer: Bytes | None = None
    request: MPI.Request | None = None


class _Ring:
    """Pre-posted receives, taken in posting order; a message comes with what followed it in its buffer, copied."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._buffers = [bytearray(MAX_NBYTES) for _ in range(RING)]
        self._requests = [comm.Irecv([buffer, MPI.BYTE], MPI.ANY_SOURCE) for buffer in self._buffers]
        self._next = 0
        self._status = MPI.Status()

    def take(self) -> tuple[int, Message, Bytes | None] | None:
        """The rank that sent the next message, the message and its small tensor, if there is one."""
        index = self._next
        if not self._requests[index].Test(self._status):
            return None
        source = self._status.Get_source()
        data = memoryview(self._buffers[index])[: self._status.Get_count(MPI.BYTE)]
        message = decode(data)
        tail = data[wire_nbytes(message) :]
        body = np.frombuffer(tail, np.uint8).copy() if tail else None
        self._requests[index] = self._comm.Irecv([self._buffers[index], MPI.BYTE], MPI.ANY_SOURCE)
        self._next = (index + 1) % RING
        return source, message, body

    def close(self) -> None:
        """Take back what is posted."""
        for request in self._requests:
            request.Cancel()
            request.Wait()


def _hang(bell: Doorbell, comm: MPI.Intracomm) -> bool:
    """Make ``bell`` known to this host's ranks; whether all of ``comm`` can ring it. Containers may share a host and
    not hear each other, so it is tried: everyone rings the next one. Collective."""
    rank, size = comm.Get_rank(), comm.Get_size()
    bell.meet(dict(_on_this_host(comm, (rank, bell.name))))
    bell.ring((rank + 1) % size)
    politely(comm.Ibarrier())
    return bool(comm.allreduce(bell.wait(0.0), MPI.LAND))


class MpiTransport:
    """Messages between the ranks of ``comm``; ``pack`` and ``unpack`` turn activations to bytes [n] and back."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        pack: Callable[[Payload], Bytes],
        unpack: Callable[[Bytes, int], Payload],
        window: int,
    ) -> None:
        politely(comm.Ibarrier())  # some are still loading; the calls that follow would spin so long
        self._messages, self._tensors = comm.Dup(), comm.Dup()
        self._pack, self._unpack = pack, unpack
        self._ring = _Ring(self._messages)
        self._inbound: dict[int, deque[_Inbound]] = {}
        self._buffers: list[Bytes] = [np.empty(0, np.uint8) for _ in range(window + 1)]
        self._next_buffer = 0
        self.messages = self.nbytes = 0
        self._sends: deque[tuple[MPI.Request, Any]] = deque()
        self._rank = comm.Get_rank()
        self._bell = Doorbell()
        self._is_heard_by_all = _hang(self._bell, comm)
        self._backoff = Backoff()
        self._idle_s = IDLE_S

    def send(self, rank: int, message: Message, payload: Payload | None) -> None:
        """See Transport."""
        body = None if payload is None else self._pack(payload)
        if body is not None:
            message = message._replace(payload_nbytes=body.nbytes)
        data = encode(message)
        self.messages += 1
        self.nbytes += len(data) + (0 if body is None else body.nbytes)
        if body is not None and len(data) + body.nbytes <= MAX_NBYTES:
            data, body = data + body.tobytes(), None
        self._sends.append((self._messages.Isend([data, MPI.BYTE], rank), data))
        if body is not None:
            self._sends.append((self._tensors.Isend([body, MPI.BYTE], rank), (body, payload)))
        self._bell.ring(rank)
        self._backoff.reset()
        if len(self._sends) > MOST_PENDING_SENDS:
            raise LocalProtocolError(f"{len(self._sends)} sends wait for their receivers")

    def poll(self) -> list[Received]:
        """See Transport."""
        arrived: list[Received] = []
        while taken := self._ring.take():
            source, message, body = taken
            if message.is_control:
                arrived.append(Received(message))
            else:
                self._inbound.setdefault(source, deque()).append(self._expect(source, message, body))
        for queue in self._inbound.values():
            while queue and (queue[0].request is None or queue[0].request.Test()):
                inbound = queue.popleft()
                message = inbound.message
                payload = None if inbound.buffer is None else self._unpack(inbound.buffer, len(message.rows))
                arrived.append(Received(message, payload))
        while self._sends and self._sends[0][0].Test():
            self._sends.popleft()
        if arrived:
            self._backoff.reset()
            self._idle_s = IDLE_S
        return arrived

    def wait(self, most_s: float) -> None:
        """See Transport. Where everybody can ring the bell nobody needs to poll, but for what is half sent or half
        here: MPI moves that on only while it is called. A bell may be quicker than what it rings for, so soon after one
        it looks up more often."""
        is_half_way = self._sends or any(self._inbound.values())
        if is_half_way or not self._is_heard_by_all:
            most_s = min(most_s, self._backoff.next_s())
        elif self._idle_s < most_s:
            most_s, self._idle_s = self._idle_s, 4 * self._idle_s
        if self._bell.wait(most_s):
            self._idle_s = IDLE_S

    def wake(self) -> None:
        """See Transport."""
        self._bell.ring(self._rank)

    def _expect(self, source: int, message: Message, body: Bytes | None) -> _Inbound:
        """Post the receive for the tensor that ``message`` announces, if it does and did not bring it (``body``)."""
        if body is not None or not message.payload_nbytes:
            return _Inbound(message, body)
        index = self._next_buffer
        self._next_buffer = (index + 1) % len(self._buffers)
        if self._buffers[index].nbytes < message.payload_nbytes:
            self._buffers[index] = np.empty(message.payload_nbytes, np.uint8)
        buffer = self._buffers[index][: message.payload_nbytes]
        return _Inbound(message, buffer, self._tensors.Irecv([buffer, MPI.BYTE], source))

    def close(self) -> None:
        """Wait until everything sent is gone, then free the communicators. Collective."""
        backoff = Backoff()
        while self._sends:
            self.poll()
            backoff.wait()
        politely(self._messages.Ibarrier())
        self._ring.close()
        self._messages.Free()
        self._tensors.Free()
        self._bell.close()


def politely(request: MPI.Request, meanwhile: Callable[[], object] = int) -> None:
    """Wait for ``request`` without burning a core; call ``meanwhile`` between looks."""
    backoff = Backoff()
    while not request.Test():
        meanwhile()
        backoff.wait()


def abort(code: int) -> None:
    """End every rank of the MPI job that this process is part of, now, with exit code ``code``; where it is alone, or
    MPI is not running, nothing happens."""
    if MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.Get_size() > 1:
        MPI.COMM_WORLD.Abort(code)


def _asked_threads() -> int:
    """What OMP_NUM_THREADS says; 0 if nothing."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(asked)) if asked.isdigit() else 0


def _share_of_cores(comm: MPI.Intracomm) -> tuple[int, bool]:
    """This rank's share of the cores that it may use, at least one, and whether anywhere ranks are clearly more than
    cores: others may use them too unless ranks are bound. Collective."""
    mine = os.sched_getaffinity(0)
    sharers = sum(not mine.isdisjoint(others) for others in _on_this_host(comm, mine))
    return max(1, len(mine) // sharers), comm.allreduce(sharers > OVERSUBSCRIBED * len(mine), MPI.LOR)


def _on_this_host(comm: MPI.Intracomm, word: T) -> list[T]:
    """What each rank of this host says. Collective."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    words: list[T] = node.allgather(word)
    node.Free()
    return words


class World:
    """The job this process is part of: its own duplicate of MPI_COMM_WORLD or of a communicator it was given."""

    def __init__(self, comm: MPI.Intracomm | None = None) -> None:
        """``threads``: this rank's share of the cores it may use, unless OMP_NUM_THREADS says otherwise;
        ``placement``: what processors ranks have; ``may_thread``: whether MPI may be called by another thread than the
        one that opened it, one at a time."""
        self.comm = (comm or MPI.COMM_WORLD).Dup()
        self.rank = self.comm.Get_rank()
        self.size = self.comm.Get_size()
        self.may_thread = bool(self.comm.allreduce(MPI.Query_thread() >= MPI.THREAD_SERIALIZED, MPI.LAND))
        fair, is_oversubscribed = _share_of_cores(self.comm)
        self.threads = _asked_threads() or fair
        shared: Placement = "oversubscribed" if is_oversubscribed else "spread"
        self.placement: Placement = shared if self.size > 1 else "alone"
        self._failing = threading.Lock()
        self.last_words: Callable[[int], None] | None = None  # what to do between saying what failed and ending all

    def muster(self, timeout_s: float) -> Muster:
        """Watch the ranks from now until all are ready. Collective."""
        names = [name_of(rank, *where) for rank, where in enumerate(self.comm.allgather(here()))]
        return Muster(self.comm.Dup(), names, timeout_s, self.may_thread, self.fail)

    @property
    def is_head(self) -> bool:
        """Whether this rank leads."""
        return self.rank == 0

    def agree(self, verdict: int, meanwhile: Callable[[], object] = int) -> int:
        """The head's ``verdict``, on every rank; who waits for it calls ``meanwhile`` now and then."""
        word = np.array([verdict], np.int64)
        politely(self.comm.Ibcast(word), meanwhile)
        return int(word[0])

    def rest(self) -> None:
        """Wait for ranks that still work, and leave the cores to them: only every few milliseconds a look."""
        request = self.comm.Ibarrier()
        while not request.Test():
            time.sleep(REST_S)

    def tell(self, words: dict[str, Any]) -> dict[str, Any]:
        """What the head says in ``words`` (JSON), on every rank."""
        text = np.frombuffer(json.dumps(words).encode(), np.uint8).copy()
        if (size := self.agree(text.size)) != text.size:
            text = np.empty(size, np.uint8)
        politely(self.comm.Ibcast(text))
        said: dict[str, Any] = json.loads(bytes(text))
        return said

    @property
    def library(self) -> str:
        """The MPI library, in its own words."""
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
        politely(self.comm.Iallgather(np.array([len(text)], np.int64), sizes))
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
        """Say what went wrong here and take every rank of the job down, now; once, whichever thread calls it first."""
        code = exit_code(error) or 1
        if self._failing.acquire(blocking=False):
            say(error, self.rank)
            if self.last_words is not None:
                with contextlib.suppress(Exception):  # what has failed may fail again
                    self.last_words(code)
            self.abort(code)
        raise SystemExit(code)

    def close(self) -> None:
        """Free the communicator. Collective."""
        self.comm.Free()
