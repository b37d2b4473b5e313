"""A simulated MPI for launch/transport.py: what the standard lets a library do, drawn from a seed.

    order      between two ranks messages of one communicator match in the order they were sent; nothing else is ordered
    matching   a receive takes the first message that fits it, a message the first receive, in their order
    buffers    a send's is read when it completes; a receive's holds rubbish from its posting until it completes
    progress   things move only while a rank calls MPI, or by themselves (``is_driven``)
    times      ways differ from message to message, and some between two ranks are all far longer
    sizes      a message of more than ``eager_nbytes`` is sent only when its receive is there

Misuse raises MpiMisuse: too small a buffer, a communicator freed before its requests are over or all its
messages received.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tests.invariants.virtual_time import VirtualTime

RUBBISH = 0xA5
POLL_S = 50e-6


class MpiMisuse(Exception):
    """A program did what MPI forbids."""


class Status:
    source = nbytes = -1

    def Get_source(self) -> int:
        return self.source

    def Get_count(self) -> int:
        return self.nbytes


NAMES = SimpleNamespace(BYTE="byte", ANY_SOURCE=-2, Status=Status)


@dataclass(slots=True, eq=False)
class Request:
    """A request of ``rank``; ``data`` is the buffer of a send or a receive."""

    library: Library
    rank: int
    data: memoryview = field(default_factory=lambda: memoryview(b""))
    source: int = -1  # of a receive: the one it is for; then the one that it was from
    nbytes: int = 0
    is_done: bool = False
    is_matched: bool = False
    abort: Callable[[], object] = lambda: None

    def Test(self, status: Status | None = None) -> bool:
        self.library.progress(self.rank)
        if self.is_done and status is not None:
            status.source, status.nbytes = self.source, self.nbytes
        return self.is_done

    def Wait(self, status: Status | None = None) -> None:
        while not self.Test(status):
            self.library.time.rest(POLL_S)

    def Cancel(self) -> None:
        if not self.is_matched:
            self.abort()
            self.is_matched = self.is_done = True


@dataclass(slots=True, eq=False)
class _Sent:
    source: int
    data: bytes | None  # None: it has not been read yet
    request: Request


@dataclass(slots=True)
class _Box:
    """Of one rank in one communicator: receives that wait for messages, and messages that wait for receives."""

    posted: deque[Request] = field(default_factory=deque)
    unexpected: deque[_Sent] = field(default_factory=deque)
    is_freed: bool = False
    open: list[Request] = field(default_factory=list)  # of either kind, for the check at the end


@dataclass(slots=True)
class _Meeting:
    said: dict[int, Any] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)


class Library:
    """The MPI of ``hosts`` (one entry a rank: its host); ``delay_s``: shortest and longest way of a message."""

    def __init__(
        self,
        time: VirtualTime,
        rng: random.Random,
        hosts: tuple[int, ...],
        delay_s: tuple[float, float] = (1e-6, 1e-4),
        eager_nbytes: int = 4096,
        is_driven: bool = True,
    ) -> None:
        self.time, self.rng, self.hosts = time, rng, hosts
        self._delay_s = delay_s
        self.eager_nbytes = eager_nbytes
        self._is_driven = is_driven
        self._due: list[deque[Callable[[], object]]] = [deque() for _ in hosts]
        self._slowness: dict[tuple[int, int], int] = {}
        self._last: dict[tuple[object, int, int], float] = {}
        self.boxes: dict[tuple[object, int], _Box] = {}
        self.meetings: dict[tuple[object, int], _Meeting] = {}

    def worlds(self, rank: int) -> tuple[Communicator, Communicator]:
        """What ``rank`` holds of the communicator of all ranks, and of that of its host's."""
        node = tuple(other for other, host in enumerate(self.hosts) if host == self.hosts[rank])
        everybody = tuple(range(len(self.hosts)))
        return (
            Communicator(self, ("world",), everybody, rank),
            Communicator(self, ("node", self.hosts[rank]), node, node.index(rank)),
        )

    def progress(self, rank: int) -> None:
        due = self._due[rank]
        while due:
            due.popleft()()

    def later(self, rank: int, action: Callable[[], object]) -> None:
        """Done by the library when ``rank`` next calls it."""
        if self._is_driven:
            self._due[rank].append(action)
        else:
            action()

    def after_a_while(self, action: Callable[[], object], lane: tuple[object, int, int] | None = None) -> None:
        """Have ``action`` done when a message would have arrived, not before the last one in its ``lane``."""
        delay_s = self.rng.uniform(*self._delay_s)
        if lane is not None:
            delay_s *= self._slowness.setdefault(lane[1:], self.rng.choice((1, 1, 1, 10)))
        when = self.time.monotonic() + delay_s
        if lane is not None:
            when = self._last[lane] = max(when, self._last.get(lane, 0.0))
        self.time.at(when, action)

    def arrive(self, box: _Box, sent: _Sent) -> None:
        if box.is_freed:
            raise MpiMisuse(f"a message of rank {sent.source} comes to a communicator that is freed")
        for request in box.posted:
            if request.source in (NAMES.ANY_SOURCE, sent.source):
                box.posted.remove(request)
                return self.match(request, sent)
        box.unexpected.append(sent)

    def match(self, request: Request, sent: _Sent) -> None:
        request.is_matched = True

        def ask() -> None:
            self.later(sent.request.rank, lambda: self._read(request, sent))

        if sent.data is not None:
            return self.later(request.rank, lambda: self._complete(request, sent))
        self.later(request.rank, lambda: self.after_a_while(ask))

    def _read(self, request: Request, sent: _Sent) -> None:
        def carried() -> None:
            sent.data, sent.request.is_done = bytes(sent.request.data), True
            self.later(request.rank, lambda: self._complete(request, sent))

        self.after_a_while(carried)

    def _complete(self, request: Request, sent: _Sent) -> None:
        data = sent.data or b""
        if len(data) > len(request.data):
            raise MpiMisuse(f"{len(data)} bytes from rank {sent.source} for a buffer of {len(request.data)}")
        request.data[: len(data)] = data
        request.source, request.nbytes, request.is_done = sent.source, len(data), True


class Communicator:
    """What one rank holds of a communicator; ``members``: the library's rank of each of its ranks."""

    def __init__(self, library: Library, name: tuple[object, ...], members: tuple[int, ...], rank: int) -> None:
        self._library, self._name, self._members, self._rank = library, name, members, rank
        self._children = self._meetings = 0
        self._box = self._box_of(rank)

    def _box_of(self, rank: int) -> _Box:
        return self._library.boxes.setdefault((self._name, rank), _Box())

    def Get_rank(self) -> int:
        return self._rank

    def Get_size(self) -> int:
        return len(self._members)

    def Dup(self) -> Communicator:
        self._children += 1
        return Communicator(self._library, (*self._name, self._children), self._members, self._rank)

    def Free(self) -> None:
        if waiting := sum(not request.is_done for request in self._box.open):
            raise MpiMisuse(f"rank {self._rank} frees a communicator in which {waiting} of its requests are open")
        if self._box.unexpected:
            left = len(self._box.unexpected)
            raise MpiMisuse(f"rank {self._rank} frees a communicator and leaves {left} messages there")
        self._box.is_freed = True

    def _open(self, data: memoryview, source: int = -1) -> Request:
        request = Request(self._library, self._members[self._rank], data, source, len(data))
        self._box.open = [*(one for one in self._box.open if not one.is_done), request]
        return request

    def Isend(self, buf: Any, dest: int) -> Request:
        library = self._library
        data = memoryview(buf[0]).cast("B")
        request = self._open(data)
        sent = _Sent(self._rank, None, request)

        def arrived() -> None:
            if len(data) <= library.eager_nbytes:
                sent.data, request.is_done = bytes(data), True
            library.arrive(self._box_of(dest), sent)

        library.after_a_while(arrived, (self._name, self._rank, dest))
        library.progress(request.rank)
        return request

    def Irecv(self, buf: Any, source: int) -> Request:
        library, box = self._library, self._box
        data = memoryview(buf[0]).cast("B")
        data[:] = bytes((RUBBISH,)) * len(data)
        request = self._open(data, source)
        request.abort = lambda: box.posted.remove(request)
        for sent in box.unexpected:
            if source in (NAMES.ANY_SOURCE, sent.source):
                box.unexpected.remove(sent)
                library.match(request, sent)
                break
        else:
            box.posted.append(request)
        library.progress(request.rank)
        return request

    def Ibarrier(self) -> Request:
        return self._meet(None)[1]

    def allgather(self, sendobj: Any) -> list[Any]:
        meeting, request = self._meet(sendobj)
        request.Wait()
        return [meeting.said[rank] for rank in range(len(self._members))]

    def _meet(self, word: Any) -> tuple[_Meeting, Request]:
        self._meetings += 1
        meeting = self._library.meetings.setdefault((self._name, self._meetings), _Meeting())
        request = Request(self._library, self._members[self._rank])
        meeting.said[self._rank] = word
        meeting.requests.append(request)
        if len(meeting.said) == len(self._members):
            for one in meeting.requests:
                self._library.after_a_while(lambda one=one: setattr(one, "is_done", True))
        return meeting, request


class Bell:
    """A doorbell of ``rank``, see launch/doorbell.py. ``loss``: how probably a ring is lost, but for the first one."""

    def __init__(self, library: Library, rank: int, bells: dict[bytes, Bell], loss: float = 0.0) -> None:
        self._library, self._rank, self._bells, self._loss = library, rank, bells, loss
        self.name = b"bell %d" % rank
        self._names: dict[int, bytes] = {}
        self._has_rung = self._is_waiting = self._is_known = False
        bells[self.name] = self

    def meet(self, names: dict[int, bytes]) -> None:
        self._names = dict(names)

    def ring(self, rank: int) -> None:
        bell = self._bells.get(self._names.get(rank, b""))
        if bell is not None and not (bell._is_known and self._library.rng.random() < self._loss):
            bell._is_known = bell._has_rung = True
            if bell._is_waiting:
                self._library.time.wake(bell._rank)

    def wait(self, seconds: float) -> bool:
        if not self._has_rung:
            self._is_waiting = True
            self._library.time.rest(seconds)
            self._is_waiting = False
        has_rung, self._has_rung = self._has_rung, False
        return has_rung

    def close(self) -> None:
        del self._bells[self.name]
