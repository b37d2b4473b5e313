"""Worlds that leave traces on disk, a file for each host, as the ranks of a real job do."""

from __future__ import annotations

from pathlib import Path

from pipeinfer.core.ports import Command, Event
from pipeinfer.runtime.trace import Header, TraceWriter
from pipeinfer.sim.random_worlds import MOST_EVENTS
from pipeinfer.sim.world import Checker, World, WorldSpec, make_job_spec


class Scribe(Checker):
    """Writes what it sees."""

    def __init__(self, name: str) -> None:
        self.writers: dict[int, TraceWriter] = {}
        self._name = name

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        rank = world.home[address]
        if rank not in self.writers:
            roles = [role.address for role in world.plan[rank]]
            header = Header(rank, len(world.hosts), roles, make_job_spec(world.spec).numbers(), host="a world")
            self.writers[rank] = TraceWriter(self._name, header)
        self.writers[rank].write(address, event, now, commands)


def trace_world(spec: WorldSpec, name: Path) -> list[Path]:
    """Run the world of ``spec``, stalls and all; the traces it left, by host."""
    scribe = Scribe(str(name))
    try:
        World(spec, (scribe,)).run(MOST_EVENTS)
    finally:
        for writer in scribe.writers.values():
            writer.close()
    return [scribe.writers[rank].path for rank in sorted(scribe.writers)]
