"""Doorbells: a rank that has sent something to another one of its host wakes it.

MPI implementations spin while they wait, and a rank that sleeps between polls receives late or wakes without need.
Every rank therefore has a datagram socket in the abstract namespace. A sender on the same host sends an empty datagram,
and a waiting rank sleeps on the socket. Correctness does not depend on doorbells: after a lost datagram the message
arrives at the next poll. Without such sockets (they are Linux's), and from other hosts, messages are polled for.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import Protocol


class Bell(Protocol):
    """Wakes a waiting rank; a wakeup may be lost."""

    name: bytes

    def meet(self, names: dict[int, bytes]) -> None:
        """The names of this host's ranks, the own one included."""
        ...

    def ring(self, rank: int) -> None:
        """Wake ``rank``, if it is a neighbour."""
        ...

    def wait(self, seconds: float) -> bool:
        """Sleep until somebody rings, ``seconds`` at most; whether somebody did."""
        ...

    def close(self) -> None:
        """Take it down."""
        ...


class Doorbell:
    """The doorbell of one rank; ``name`` is what its neighbours need to ring it, empty if they cannot."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self.name = b""
        self._names: dict[int, bytes] = {}
        with contextlib.suppress(OSError, AttributeError, TypeError):
            bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            bell.bind("")  # the kernel finds a free abstract name
            self._socket, self.name = bell, bytes(bell.getsockname())

    def meet(self, names: dict[int, bytes]) -> None:
        """The names of this host's ranks, the own one included."""
        self._names = {rank: name for rank, name in names.items() if name}

    def ring(self, rank: int) -> None:
        """Wake ``rank``, if it is a neighbour."""
        name = self._names.get(rank)
        if name and self._socket is not None:
            with contextlib.suppress(OSError):  # its queue is full, so it wakes anyway; or it has exited
                self._socket.sendto(b"", name)

    def wait(self, seconds: float) -> bool:
        """Sleep until somebody rings, ``seconds`` at most; whether somebody did."""
        if self._socket is None:
            time.sleep(seconds)
            return False
        if not select.select([self._socket], [], [], seconds)[0]:
            return False
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(1)
        return True

    def close(self) -> None:
        """Take it down."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
