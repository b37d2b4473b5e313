"""A job in which one thing goes wrong; the first argument says what, a second one where to write traces. Started by
test_programs.py and test_traces.py under mpiexec."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

from launch.head import LocalJob
from launch.job import Job
from launch.mpi import World
from pipeinfer.core.config import Config
from pipeinfer.core.messages import Run
from pipeinfer.core.ports import Batch, Received, Request
from pipeinfer.placement.roles import assign
from speculation.schedules.policy import CONTINUOUS
from stages.models.emulated import EmulatedPair, EmulatedShard, EmulatedSpec
from stages.stage.machine import Stage

SPEC = EmulatedSpec(layers=8)


class RaisingShard(EmulatedShard):
    """Fails in its tenth pass, those aside that are made after loading, whose activations are blank."""

    passes = 0

    def forward(self, batch: Batch, hidden: Any) -> Generator[float, None, Any]:
        RaisingShard.passes += bool(hidden.any())
        if RaisingShard.passes == 10:
            raise RuntimeError("the tenth pass fails")
        return super().forward(batch, hidden)


class RaisingPair(EmulatedPair):
    """Its second stage fails."""

    def stage(self, layers: range, capacity: int) -> EmulatedShard:
        shard = RaisingShard if layers.start else EmulatedShard
        return shard(SPEC, layers, capacity)


def lose_runs(stage: type[Stage]) -> None:
    """Make the last stage swallow its tenth run and all later ones."""
    take = Stage._receive

    def receive(self: Stage, event: Received) -> list[Any]:
        body = event.message.body
        if self._is_last and isinstance(body, Run) and body.run >= 10:
            return []
        return take(self, event)

    stage._receive = receive  # type: ignore[method-assign]


def main(fault: str, trace: str | None = None) -> None:
    world = World()
    try:
        pair_type = RaisingPair if fault == "raise" else EmulatedPair
        if fault == "swallow":
            lose_runs(Stage)
        pair = pair_type(SPEC, lambda rows, context: 0.0, lambda rows, context: 0.0)
        plan = assign(world.size, SPEC.layers, 1)
        config = Config(policy=CONTINUOUS.settings(), timeout_s=5.0, trace=trace)
        job = Job(config, plan, 200, pair, world)
        if world.is_head:
            head = LocalJob(job, is_threaded=False)
            head.decode(Request((1, 2, 3), 100))
            head.close()
        else:
            job.serve()
    except BaseException as error:
        world.fail(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
