"""The channel between a job and the process that started it: JSON objects, one per line, over a socket.

Both ends are processes of one user on one host. The socket has a name in no file system, so that nothing is left behind
and no directory's length or absence matters; whoever connects is asked for its user by the kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import threading
from typing import Any

from pipeinfer.core.errors import PipeinferError

BEGINS = "@"
"""Stands for the zero byte with which such names begin."""


def listen() -> tuple[socket.socket, str]:
    """A listening socket, and its name for ``connect``."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind("")  # the kernel finds a free name
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener, bytes(listener.getsockname()).replace(b"\0", BEGINS.encode(), 1).decode()


def connect(name: str) -> socket.socket:
    """A socket connected to the one that ``listen`` called ``name``. Raises PipeinferError where it is another user's,
    OSError where it is gone."""
    wire = socket.socket(socket.AF_UNIX)
    try:
        wire.connect(name.replace(BEGINS, "\0", 1).encode())
        if not is_ours(wire):
            raise PipeinferError("the program at the other end belongs to another user")
    except BaseException:
        wire.close()
        raise
    return wire


def is_ours(wire: socket.socket) -> bool:
    """Whether the process at the other end runs as this one's user."""
    credentials = wire.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.geteuid())


class JsonChannel:
    """One end of ``wire``, which whoever opened it closes. One thread receives, any may send.

    Not a text file over the socket: writing to one of those throws away what it has read ahead, and ``select`` does not
    see what that is."""

    def __init__(self, wire: socket.socket) -> None:
        self.wire = wire
        self._sending = threading.Lock()
        self._ahead = b""  # what has arrived and was not received yet

    def send(self, message: dict[str, Any]) -> None:
        """Send ``message``. Raises ConnectionError where the other end is gone."""
        line = json.dumps(message).encode() + b"\n"
        with self._sending:
            self.wire.sendall(line)

    def try_to_send(self, message: dict[str, Any]) -> None:
        """As ``send``, but nothing is raised where the other end is gone: the receiving thread finds out."""
        with contextlib.suppress(OSError):
            self.send(message)

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next message and return it; None if the other end is gone."""
        while b"\n" not in self._ahead:
            try:
                arrived = self.wire.recv(1 << 16)
            except OSError:
                arrived = b""
            if not arrived:
                return None
            self._ahead += arrived
        line, _, self._ahead = self._ahead.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    @property
    def is_readable(self) -> bool:
        """Whether there is something to read: an object, or the end of the connection."""
        return b"\n" in self._ahead or bool(select.select([self.wire], [], [], 0)[0])
