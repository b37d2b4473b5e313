"""Words between a job and whoever started it: JSON objects, one a line, over a socket.

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
    """One end of ``wire``, which whoever opened it closes. One thread hears, any may say.

    Not a text file over the socket: writing to one of those throws away what it has read ahead, and ``select`` does not
    see what that is."""

    def __init__(self, wire: socket.socket) -> None:
        self.wire = wire
        self._saying = threading.Lock()
        self._ahead = b""  # what has arrived and was not heard yet

    def say(self, words: dict[str, Any]) -> None:
        """Send ``words``. Raises ConnectionError where nobody listens."""
        line = json.dumps(words).encode() + b"\n"
        with self._saying:
            self.wire.sendall(line)

    def try_to_say(self, words: dict[str, Any]) -> None:
        """As ``say``, but where nobody listens nothing is said: whoever hears learns that soon enough."""
        with contextlib.suppress(OSError):
            self.say(words)

    def hear(self) -> dict[str, Any] | None:
        """The next words, waited for; None if the other end is gone."""
        while b"\n" not in self._ahead:
            try:
                arrived = self.wire.recv(1 << 16)
            except OSError:
                arrived = b""
            if not arrived:
                return None
            self._ahead += arrived
        line, _, self._ahead = self._ahead.partition(b"\n")
        words: dict[str, Any] = json.loads(line)
        return words

    @property
    def is_spoken_to(self) -> bool:
        """Whether there is something to hear, be it that the other end is gone."""
        return b"\n" in self._ahead or bool(select.select([self.wire], [], [], 0)[0])
