"""One rank of a job that spawn.py started. Every rank reports its progress to its parent; rank 0 also passes requests
and output between the job and the parent."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from launch.environment import launched
from launch.failure import in_a_line, report
from launch.json_channel import JsonChannel, connect
from launch.requests import Close, RequestOutput
from launch.signals import ORDERLY_S, end_in_order, end_undisturbed
from launch.wire_forms import order_from_dict, output_to_dict
from pipeinfer.core.config import Config
from pipeinfer.core.errors import Terminated, exit_code, origin

if TYPE_CHECKING:
    from launch.head import Head
    from launch.mpi import World


LAUNCHER_S = 1.0
"""A parent that ends a job tells mpiexec, too. mpiexec reports a rank that ends before it has heard."""


class Parent:
    """Whoever started this rank, at the socket called ``name``."""

    def __init__(self, name: str, rank: int) -> None:
        self.lines = JsonChannel(connect(name))
        self.lines.send({"rank": rank, "pid": os.getpid()})
        first = self.lines.receive()
        if first is None:
            raise SystemExit(1)
        self.config = Config.of(first["config"])
        self.is_gone = False
        self._head: Head | None = None
        self._heading = threading.Lock()
        threading.Thread(target=self._receive_orders, name="pipeinfer orders", daemon=True).start()

    def _receive_orders(self) -> None:
        """Pass orders on to the head until the parent is gone; then end."""
        while (order := self.lines.receive()) is not None:
            assert self._head is not None, "the parent asks only once it has been sent that all are ready"
            self._head.order(order_from_dict(order))
        with self._heading:
            self.is_gone = True
            if self._head is not None:
                self._head.order(Close())
            else:  # the main thread loads, or serves another rank's orders
                threading.Event().wait(LAUNCHER_S)
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(ORDERLY_S)  # a main thread inside MPI takes no signal
                os._exit(128 + signal.SIGTERM)

    def direct(self, head: Head) -> None:
        """From now on orders are for ``head``. Raises Terminated if the parent has gone."""
        with self._heading:
            self._head = head
            if self.is_gone:
                raise Terminated(signal.SIGTERM)

    def send_output(self, output: RequestOutput) -> None:
        """Pass ``output`` on."""
        self.lines.try_to_send({"output": output_to_dict(output)})


def main(name: str) -> int:
    """``name``: the socket of whoever started us. Returns the exit code; where a rank fails, all end."""
    launch = launched()
    rank = launch.rank if launch is not None else 0
    end_in_order()
    parent, world = None, None
    try:
        parent = Parent(name, rank)
        from launch.mpi import World

        parent.lines.try_to_send({"joining": True})
        world = World()
        play(world, parent)
    except BaseException as raised:
        error = origin(raised)
        if parent is None or parent.is_gone:  # no parent is left to report to, and mpiexec ends with its ranks
            os._exit(exit_code(error) or 1)
        parent.lines.try_to_send({"failed": in_a_line(error, rank)})
        if world is not None:
            world.fail(error)
        report(error, rank)
        end_undisturbed()
        return exit_code(error) or 1
    world.close()
    end_undisturbed()
    world.end_mpi()
    return 0


def play(world: World, parent: Parent) -> None:
    """Load this rank's share and work until the job is over."""
    from launch.collector import frozen
    from launch.head import Head
    from launch.job import load
    from launch.preflight import clear

    config = parent.config
    rendezvous = world.rendezvous(config.timeout_s)
    parent.lines.try_to_send({"joined": True})
    with rendezvous.busy("checking"):
        cleared = clear(config, world.size, world.has_kernels)
    job = load(cleared, world, rendezvous)
    with frozen():
        if not world.is_head:
            job.serve()
            return
        head = Head(job, parent.send_output)
        parent.direct(head)
        parent.lines.try_to_send({"ranks": job.ranks})
        head.lead()


if __name__ == "__main__":
    code = main(sys.argv[1])
    if code == 0:  # nothing is left to end but Python, which would take half a second to take torch's modules apart
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    raise SystemExit(code)
