"""Digests of all decisions in seeded worlds, to show that a change of the code changes no decision.

    python -m pipeinfer.sim.digest --worlds 300

A digest is the SHA-256 of what the orchestrator sent, emitted and received: number, time and rows of each run,
tokens of each emission, the end of each request, the time of each result. Times depend on the size of messages. So that
digests compare across wire formats, links charge the sizes of wire format 2 here, and Settings that wire format 2 would
not have sent cost nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

from pipeinfer.core.addresses import FIRST_DRAFTER, ORCHESTRATOR
from pipeinfer.core.links import Link
from pipeinfer.core.messages import (
    Advance,
    Calibrate,
    Cancel,
    Credit,
    DraftOrder,
    Message,
    Nodes,
    Prompt,
    Result,
    Run,
    Settings,
)
from pipeinfer.core.ports import GREEDY, Command, Emit, Event, Finish, Idle, Payload, Received, Sampling, Send
from pipeinfer.sim.network import Network
from pipeinfer.sim.random_worlds import MOST_EVENTS, SCHEDULES, draw_world
from pipeinfer.sim.world import Checker, World


class Network2(Network):
    """A network that charges the sizes of wire format 2, and nothing for Settings that repeat the last ones."""

    def __init__(self, link: Link, rng: random.Random) -> None:
        super().__init__(link, rng)
        self._settings: dict[tuple[int, int], Sampling] = {}

    def arrivals(self, source: int, dest: int, message: Message, payload: Payload | None, now: float) -> list[float]:
        """See Network."""
        body = message.body
        if isinstance(body, Settings) and message.dest < FIRST_DRAFTER:
            edge, sampling = (message.source, message.dest), replace(Sampling.of(body), prompt_length=0)
            before, self._settings[edge] = self._settings.get(edge, GREEDY), sampling
            if sampling == before:
                return [max(now, self._last_arrival.get((source, dest), 0.0))]
        return super().arrivals(source, dest, message, payload, now)

    def size(self, message: Message, payload: Payload | None) -> int:
        """A header of 40 bytes, 16 for each item, the payload. The first run of all carried one operation more."""
        match message.body:
            case Run(run=run, ops=ops, rows=rows):
                items = len(rows) + len(ops) + (run == 1)
            case Result(rows=rows) | Cancel(rows=rows):
                items = len(rows)
            case Nodes(nodes=rows) | Prompt(tokens=rows) | Advance(tokens=rows):
                items = len(rows)
            case Calibrate(offsets=offsets):
                items = 1 + len(offsets)
            case Settings():
                items = 5
            case Credit(rows=rows):
                items = int(rows > 0)
            case DraftOrder():
                items = 1
            case _:
                items = 0
        return 40 + 16 * items + self._link.payload_nbytes(message, payload)


class Decisions(Checker):
    """The digest of one world."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if address != ORCHESTRATOR:
            return
        if isinstance(event, Received) and isinstance(event.message.body, Result):
            self._add(f"result {now!r} {event.message.body.run}")
        for command in commands:
            if isinstance(command, Send) and isinstance(command.message.body, Run):
                run = command.message.body
                self._add(f"run {now!r} {run.run} {[tuple(row[:4]) for row in run.rows]}")
            elif isinstance(command, Emit):
                self._add(f"tokens {now!r} {command.number} {list(command.tokens)}")
            elif isinstance(command, Finish):
                reason = command.reason.replace("aborted", "withdrawn")  # as it was called when digests began
                self._add(f"finish {now!r} {command.number} {reason}")
            elif isinstance(command, Idle):
                self._add(f"idle {now!r} {command.number}")

    def _add(self, line: str) -> None:
        self.sha.update(f"{line}\n".encode())


def world_digest(seed: int, schedule: str) -> str:
    """The digest of the decisions in the world of ``seed`` and ``schedule``, its requests one after another."""
    decisions = Decisions()
    World(draw_world(random.Random(seed), seed, schedule), (decisions,), network=Network2).run(MOST_EVENTS)
    return decisions.sha.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one digest for each schedule."""
    parser = argparse.ArgumentParser(description="digests of all decisions in seeded worlds, one for each schedule")
    parser.add_argument("--worlds", type=int, default=300, metavar="N", help="seeds 0 to N - 1 (default 300)")
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    args = parser.parse_args(arguments)
    with ProcessPoolExecutor(args.processes) as pool:
        for schedule in SCHEDULES:
            found = pool.map(partial(world_digest, schedule=schedule), range(args.worlds), chunksize=10)
            print(schedule, hashlib.sha256("\n".join(found).encode()).hexdigest()[:16], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
