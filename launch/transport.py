"""The transport over MPI: messages and tensors between the ranks of one communicator.

It imports no MPI. Communicator, names (``mpi``: the module mpi4py.MPI, or a simulated one), doorbell and clock are
injected, so that the same code runs over a library (launch/mpi.py) and under the invariants (tests/invariants).

Theory of operation. The job's communicator is duplicated twice, so that its messages match no messages of other
code.

    messages  a ring of pre-posted receives from any source. MPI matches them in posting order and keeps the order of
              each sender, so taking them in ring order keeps it too. Stream and control messages share the ring,
              because one test then shows that nothing has arrived, the most frequent case. A tensor that fits into the
              same buffer follows its message there.
    tensors   for larger ones. No receive is posted until a message announces one; then it is, from that sender. Both
              sides count alike, so the n-th tensor meets the n-th announcement.

Everything is non-blocking. A message whose tensor has not arrived holds back the later ones of its sender only, and no
CONTROL. Sends are kept, buffers and all, until MPI is done with them. Large tensors of one sender land in a fixed
rotation of buffers: as a run is one of at most ``window`` in flight, its buffer is free again before its turn comes
round. Senders do not share a rotation, for a quick one would come round while a slow one's tensor is still in use.

No rank spins: an idle rank sleeps until a doorbell rings (see Doorbell) or between polls (see Backoff). Many ranks can
therefore share few cores. No blocking MPI call is made while a job serves.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from launch.backoff import LONG_S, Backoff, Clock
from launch.doorbell import Bell, Doorbell
from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.messages import Message
from pipeinfer.core.ports import Payload, Received
from pipeinfer.core.wire import MAX_NBYTES, decode, encode, wire_nbytes

Bytes = npt.NDArray[np.uint8]
RING = 8
MOST_PENDING_SENDS = 4096
EAGER_NBYTES = 1 << 15
"""A tensor that fits into so many bytes together with its message travels behind it."""
IDLE_S = 4e-3
"""First poll after a doorbell; each further interval is four times as long."""


class Status(Protocol):
    """What is known of a received message."""

    def Get_source(self) -> int:
        """The rank that sent it."""
        ...

    def Get_count(self) -> int:
        """Its bytes."""
        ...


class Handle(Protocol):
    """A request of MPI."""

    def Test(self, status: Any = None) -> bool:
        """Move everything forward; whether this one is complete."""
        ...

    def Wait(self, status: Any = None) -> Any:
        """Return when it is complete or cancelled."""
        ...

    def Cancel(self) -> None:
        """Cancel the request, unless it is matched."""
        ...


class Communicator(Protocol):
    """What the transport needs of a communicator of mpi4py, under the names it has there."""

    def Get_rank(self) -> int:
        """The caller's rank."""
        ...

    def Get_size(self) -> int:
        """How many ranks there are."""
        ...

    def Dup(self) -> Communicator:
        """The same ranks, with messages of their own. Collective."""
        ...

    def Free(self) -> None:
        """Let go of it. Collective."""
        ...

    def Isend(self, buf: Any, dest: int) -> Handle:
        """Send what ``buf`` holds; it must stay as it is until the request is complete."""
        ...

    def Irecv(self, buf: Any, source: int) -> Handle:
        """Receive into ``buf``, which must be left alone until the request is complete."""
        ...

    def Ibarrier(self) -> Handle:
        """Complete when every rank has called it."""
        ...

    def allgather(self, sendobj: Any) -> list[Any]:
        """One object per rank. Collective."""
        ...


class Names(Protocol):
    """The names that a library has beside its communicators, as in the module mpi4py.MPI."""

    @property
    def BYTE(self) -> Any:
        """The type of a byte."""
        ...

    @property
    def ANY_SOURCE(self) -> int:
        """Any sender."""
        ...

    @property
    def Status(self) -> Callable[[], Status]:
        """Makes an empty status."""
        ...


@dataclass(slots=True)
class _Inbound:
    message: Message
    buffer: Bytes | None = None
    request: Handle | None = None


class _Rotation:
    """Buffers for the large tensors of one sender, each used again after ``window`` further ones."""

    def __init__(self, window: int) -> None:
        self._buffers: list[Bytes] = [np.empty(0, np.uint8) for _ in range(window + 1)]
        self._next = 0

    def take(self, nbytes: int) -> Bytes:
        """The next buffer, of so many bytes."""
        index = self._next
        self._next = (index + 1) % len(self._buffers)
        if self._buffers[index].nbytes < nbytes:
            self._buffers[index] = np.empty(nbytes, np.uint8)
        return self._buffers[index][:nbytes]


class _Ring:
    """Pre-posted receives, taken in posting order; a message comes with what followed it in its buffer, copied."""

    def __init__(self, comm: Communicator, mpi: Names) -> None:
        self._comm = comm
        self._mpi = mpi
        self._buffers = [bytearray(MAX_NBYTES) for _ in range(RING)]
        self._requests = [self._post(index) for index in range(RING)]
        self._next = 0
        self._status = mpi.Status()

    def _post(self, index: int) -> Handle:
        return self._comm.Irecv([self._buffers[index], self._mpi.BYTE], self._mpi.ANY_SOURCE)

    def take(self) -> tuple[int, Message, Bytes | None] | None:
        """The rank that sent the next message, the message and its small tensor, if there is one."""
        index = self._next
        if not self._requests[index].Test(self._status):
            return None
        source = self._status.Get_source()
        data = memoryview(self._buffers[index])[: self._status.Get_count()]
        message = decode(data)
        tail = data[wire_nbytes(message) :]
        body = np.frombuffer(tail, np.uint8).copy() if tail else None
        self._requests[index] = self._post(index)
        self._next = (index + 1) % RING
        return source, message, body

    def close(self) -> None:
        """Take back what is posted."""
        for request in self._requests:
            request.Cancel()
            request.Wait()


def _hang(bell: Bell, comm: Communicator, node: Communicator, clock: Clock) -> bool:
    """Make ``bell`` known to this host's ranks, ``node``; whether all of ``comm`` can ring it. Containers may share a
    host and not reach each other, so it is tried: every rank rings the next one. Collective."""
    rank, size = comm.Get_rank(), comm.Get_size()
    bell.meet(dict(node.allgather((rank, bell.name))))
    bell.ring((rank + 1) % size)
    politely(comm.Ibarrier(), clock=clock)
    return all(comm.allgather(bell.wait(0.0)))


class MpiTransport:
    """Messages between the ranks of ``comm``, of which those of ``node`` are on this host; ``pack`` and ``unpack`` turn
    activations to bytes [n] and back.

    ``mpi``: the names of the library that ``comm`` is of. A payload that was received is a window on a buffer, which
    stays as it is until its sender has announced ``window`` further tensors."""

    def __init__(
        self,
        comm: Communicator,
        node: Communicator,
        pack: Callable[[Payload], Bytes],
        unpack: Callable[[Bytes, int], Payload],
        window: int,
        mpi: Names,
        bell: Bell | None = None,
        clock: Clock = time,
    ) -> None:
        self._clock = clock
        politely(comm.Ibarrier(), clock=clock)  # some ranks still load; the next calls would spin meanwhile
        self._messages, self._tensors = comm.Dup(), comm.Dup()
        self._pack, self._unpack = pack, unpack
        self._byte = mpi.BYTE
        self._ring = _Ring(self._messages, mpi)
        self._inbound: dict[int, deque[_Inbound]] = {}
        self._window = window
        self._rotations: dict[int, _Rotation] = {}
        self.messages = self.nbytes = 0
        self._sends: deque[tuple[Handle, Any]] = deque()
        self._rank = comm.Get_rank()
        self._bell = bell or Doorbell()
        self._is_heard_by_all = _hang(self._bell, comm, node, clock)
        self._backoff = Backoff(clock)
        self._idle_s = IDLE_S

    def send(self, rank: int, message: Message, payload: Payload | None) -> None:
        """See Transport."""
        body = None if payload is None else self._pack(payload)
        if body is not None:
            message = message._replace(payload_nbytes=body.nbytes)
        data = encode(message)
        self.messages += 1
        self.nbytes += len(data) + (0 if body is None else body.nbytes)
        if body is not None and len(data) + body.nbytes <= EAGER_NBYTES:
            data, body = data + body.tobytes(), None
        self._sends.append((self._messages.Isend([data, self._byte], rank), data))
        if body is not None:
            self._sends.append((self._tensors.Isend([body, self._byte], rank), (body, payload)))
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
                payload = None if inbound.buffer is None else self._unpack(inbound.buffer, message.payload_rows)
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
        if source not in self._rotations:
            self._rotations[source] = _Rotation(self._window)
        buffer = self._rotations[source].take(message.payload_nbytes)
        return _Inbound(message, buffer, self._tensors.Irecv([buffer, self._byte], source))

    def close(self) -> None:
        """Wait until everything sent is gone, then free the communicators. Collective."""
        backoff = Backoff(self._clock)
        while self._sends:
            self.poll()
            backoff.wait()
        politely(self._messages.Ibarrier(), clock=self._clock)
        self._ring.close()
        self._messages.Free()
        self._tensors.Free()
        self._bell.close()


def politely(
    request: Handle, meanwhile: Callable[[], object] = int, clock: Clock = time, long_s: float = LONG_S
) -> None:
    """Wait for ``request`` with sleeps between polls, that grow to ``long_s``; call ``meanwhile`` after each poll."""
    backoff = Backoff(clock, long_s)
    while not request.Test():
        meanwhile()
        backoff.wait()

