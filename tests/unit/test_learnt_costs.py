"""What the orchestrator learns of the cost of rows: whatever dies on the way, no run seems cheaper than it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeinfer.core.addresses import ORCHESTRATOR
from pipeinfer.core.links import Link
from pipeinfer.core.ports import Command, Event, Request
from pipeinfer.orchestrator.machine import Orchestrator
from pipeinfer.sim.world import Checker, World, WorldSpec
from speculation.schedules.continuous import Continuous
from speculation.schedules.policy import CONTINUOUS
from stages.models.emulated import EmulatedSpec, spread

STAGES, FREE = 8, 4


def pace(rows: int, context: int) -> float:
    """Four rows are free, as many again take as long again; of a stage's only layer."""
    return max(rows, FREE) / FREE


class Reader(Checker):
    """Keeps the least share of its true price that any number of rows was ever thought to have."""

    def __init__(self) -> None:
        self.least = 1.0
        self.wide = 0

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        if address == ORCHESTRATOR:
            (machine,) = (one for one in world.machines if isinstance(one, Orchestrator))
            assert isinstance(machine._schedule, Continuous)
            assert machine._schedule._governor is not None
            for rows, seconds in machine._schedule._governor.curve._seconds.items():
                self.least = min(self.least, seconds / pace(rows, 0))
                self.wide = max(self.wide, rows)


@pytest.mark.parametrize("seed", [1, 5])  # of the first eight those in which it failed while all runs taught
def test_a_run_that_lost_rows_does_not_make_rows_cheap(seed: int) -> None:
    request = Request((1, 2, 3 + seed), 200)
    model = EmulatedSpec(STAGES, 5000, seed, spread(0.79))
    policy = replace(CONTINUOUS, prompt_lookup=0)
    reader = Reader()
    paces, link = (pace, lambda rows, context: 0.17), Link(delay_s=0.17)
    World(WorldSpec(seed, policy, STAGES, (request,), model, paces=paces, link=link), (reader,)).run()
    assert reader.wide > FREE, "no run was wide enough to lose rows"
    assert reader.least > 0.99, f"seed {seed}: rows at {reader.least:.2f} of their price"
