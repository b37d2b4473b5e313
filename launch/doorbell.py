"""Doorbells: a rank that has sent something to another one of its host wakes it.

MPI cannot wait without spinning, and who sleeps between polls hears late or wakes in vain. So every rank has a socket
for datagrams, named in no file system; a sender of the same host drops an empty one into it, and a waiting rank sleeps
on the socket. Nothing depends on it: a ring that is lost is heard at the next poll, and where there are no such sockets
(they are Linux's), or where the sender is on another host, polls are all there is.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from typing import Protocol


class Bell(Protocol):
    """What wakes a waiting rank; a bell may be lost."""

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
            with contextlib.suppress(OSError):  # its queue is full: it will wake anyway; or it is gone
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
