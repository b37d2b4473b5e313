"""What a rank takes around its layers: a stage on an MPI rank of its own gets the messages of a recorded job, one run
at a time, and passes them on. Its shard has layers that do nothing. Rank 0 plays everybody else.

    python -m launch.mpiexec -n 2 -- python -m benchmarks.profiling.ranks     (JSON, for benchmarks.profile)
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Generator
from dataclasses import asdict

import torch

from benchmarks.profiling.costs import Cost, Stopwatch
from benchmarks.profiling.jobs import Job, simulated
from launch.backoff import Backoff
from launch.driver import Driver
from launch.mpi import MpiTransport, World
from pipeinfer.bench.passes import random_model
from pipeinfer.core.addresses import stage_address
from pipeinfer.core.messages import Run
from pipeinfer.core.ports import Batch, Command, Computed, Event, Received
from pipeinfer.runtime.executor import Executor
from speculation.schedules.policy import CONTINUOUS
from stages.checkpoint.random_weights import RandomCheckpoint
from stages.models.pair import CheckpointPair

RUN_BUDGET_US = 300.0
MODEL = random_model(layers=1, hidden=1024, intermediate=1024, heads=16, kv_heads=4, vocab=1024)
STAGE = stage_address(3)
LAYERS = 8


class Idle:
    """A shard of so many layers that change nothing."""

    weight_nbytes = 0

    def __init__(self, layers: int) -> None:
        self.faults: dict[int, int] = {}
        self._layers = layers

    def forward(self, batch: Batch, hidden: torch.Tensor) -> Generator[float, None, torch.Tensor]:
        """See ShardModel; yields twice a layer, as the Llama shard does."""
        for _ in range(2 * self._layers):
            yield 0.0
        return hidden


def lead(job: Job, transport: MpiTransport) -> None:
    """Send the stage what it was sent, each run when the last one is back."""
    backoff = Backoff()
    for step in job.steps:
        if step.address != STAGE or not isinstance(step.event, Received):
            continue
        message, rows = step.event.message, step.event.message.payload_rows
        is_run = isinstance(message.body, Run)
        transport.send(1, message, torch.zeros(rows, MODEL.hidden_size) if is_run and rows else None)
        while is_run and all(not isinstance(event.message.body, Run) for event in transport.poll()):
            backoff.wait()


def serve(job: Job, transport: MpiTransport, layers: int) -> tuple[list[float], list[float]]:
    """Play the stage. Microseconds of each run that was computed, of all turns that moved it; of each turn without
    work."""
    driver = Driver(defaultdict(int), transport)
    runs, computed = [0.0], set[int]()

    def observe(address: int, event: Event, now: float, commands: list[Command]) -> None:
        if isinstance(event, Received) and isinstance(event.message.body, Run):
            runs.append(0.0)
        elif isinstance(event, Computed):
            computed.add(len(runs) - 1)

    driver.executor = Executor([job.job_spec.machine(STAGE)], {STAGE: Idle(layers)}, driver, observe)
    idle, watch = list[float](), Stopwatch()
    while not driver.executor.is_halted:
        before = driver.moved_at
        watch(driver.turn)
        if driver.moved_at == before:
            idle.append(watch.us.pop())
        else:
            runs[-1] += watch.us.pop()
    return [runs[index] for index in computed], idle


def main() -> None:
    """Both ranks; the stage's prints."""
    world, job = World(), simulated(CONTINUOUS)
    pair = CheckpointPair((MODEL, RandomCheckpoint(MODEL)), (), "fp32")
    found: list[Cost] = []
    for layers in (0, LAYERS):
        transport = MpiTransport(world.comm, world.node, pair.pack, pair.unpack, job.job_spec.window)
        if world.is_head:
            lead(job, transport)
        else:
            runs, idle = serve(job, transport, layers)
            found.append(Cost(f"rank: a run, message to message, {layers} layers without work", runs, RUN_BUDGET_US))
        transport.close()
    if found:
        print(json.dumps([asdict(cost) for cost in [*found, Cost("rank: a turn without work", idle)]]), flush=True)
    world.close()


if __name__ == "__main__":
    main()
