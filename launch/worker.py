"""One rank of a job that spawn.py started. Every rank tells its parent how far it is; rank 0 also carries requests and
news between the job and the parent."""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from launch.environment import launched
from launch.failure import in_a_line, say
from launch.json_channel import JsonChannel, connect
from launch.signals import end_in_order
from pipeinfer.core.config import Config
from pipeinfer.core.errors import Terminated, exit_code, origin
from pipeinfer.core.ports import Request, Sampling

if TYPE_CHECKING:
    from launch.head import Head
    from launch.mpi import World
    from launch.requests import RequestOutput


class Parent:
    """Whoever started this rank, at the socket called ``name``."""

    def __init__(self, name: str, rank: int) -> None:
        self.lines = JsonChannel(connect(name))
        self.lines.say({"rank": rank, "pid": os.getpid()})
        words = self.lines.hear()
        if words is None:
            raise SystemExit(1)
        self.config = Config.of(words["config"])
        self.is_gone = False
        self._head: Head | None = None
        self._heading = threading.Lock()
        threading.Thread(target=self._hear, name="pipeinfer orders", daemon=True).start()

    def _hear(self) -> None:
        """Pass orders on to the head until the parent is gone; then end."""
        from launch.head import Close

        while (words := self.lines.hear()) is not None:
            assert self._head is not None, "the parent asks only once it was told that all are ready"
            self._head.order(order_of(words))
        with self._heading:
            self.is_gone = True
            if self._head is not None:
                self._head.order(Close())
            else:  # the main thread loads, or serves another rank's orders
                os.kill(os.getpid(), signal.SIGTERM)

    def direct(self, head: Head) -> None:
        """From now on orders are for ``head``. Raises Terminated if the parent has gone."""
        with self._heading:
            self._head = head
            if self.is_gone:
                raise Terminated(signal.SIGTERM)

    def tell(self, news: RequestOutput) -> None:
        """Pass ``news`` on."""
        self.lines.try_to_say(words_of(news))


def words_of(news: RequestOutput) -> dict[str, Any]:
    """``news`` as JSON has it; errors end the ranks and are not told so."""
    found = {member.name: getattr(news, member.name) for member in fields(news) if member.name != "error"}
    if news.stats is not None:
        found["stats"] = {member.name: getattr(news.stats, member.name) for member in fields(news.stats)}
    return found


def order_of(words: dict[str, Any]) -> Any:
    """What the parent orders in ``words``."""
    from launch.head import Cancel, Close, Submit

    if "close" in words:
        return Close()
    if "cancel" in words:
        return Cancel(words["cancel"])
    asked = words["submit"]
    request = Request(
        tuple(asked["prompt"]), asked["max_new_tokens"], frozenset(asked["stop_tokens"]), Sampling(**asked["sampling"])
    )
    return Submit(asked["number"], request)


def main(name: str) -> int:
    """``name``: the socket of whoever started us. Returns the exit code; where a rank fails, all end."""
    launch = launched()
    rank = launch.rank if launch is not None else 0
    end_in_order()
    parent, world = None, None
    try:
        parent = Parent(name, rank)
        from launch.mpi import World

        world = World()
        play(world, parent)
    except BaseException as raised:
        error = origin(raised)
        if parent is None or parent.is_gone:  # nobody is there to be told, and mpiexec ends with its ranks
            os._exit(exit_code(error) or 1)
        parent.lines.try_to_say({"failed": in_a_line(error, rank)})
        if world is not None:
            world.fail(error)
        say(error, rank)
        return exit_code(error) or 1
    world.close()
    return 0


def play(world: World, parent: Parent) -> None:
    """Load this rank's share and work until the job is over."""
    from launch.collector import frozen
    from launch.head import Head
    from launch.job import load
    from launch.preflight import clear

    config = parent.config
    muster = world.muster(config.timeout_s)
    parent.lines.try_to_say({"joined": True})
    with muster.busy("checking"):
        cleared = clear(config, world.size)
    job = load(config, cleared, world, muster)
    with frozen():
        if not world.is_head:
            job.serve()
            return
        head = Head(job, parent.tell)
        parent.direct(head)
        parent.lines.try_to_say({"ranks": job.ranks})
        head.lead()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
