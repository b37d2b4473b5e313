"""Recorded jobs: what happened to whom, to be told again to fresh machines."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

from pipeinfer.core.addresses import FIRST_DRAFTER, ORCHESTRATOR
from pipeinfer.core.ports import Event, Received, Request
from pipeinfer.runtime.job_spec import JobSpec
from pipeinfer.runtime.trace import Step, Trace
from pipeinfer.sim.replay import Recorder
from pipeinfer.sim.world import World, WorldSpec, make_job_spec
from speculation.schedules.policy import Policy
from stages.models.emulated import EmulatedSpec, spread

STAGES = 8
PROMPT, TOKENS = 256, 256
CROWD, CROWD_STAGES = 64, 4
CROWD_PROMPT, CROWD_TOKENS = 16, 60


@dataclass(frozen=True, slots=True)
class Job:
    """Who played, and all that happened."""

    job_spec: JobSpec
    steps: list[Step]


def simulated(policy: Policy) -> Job:
    """A request over 8 stages; a draft pass takes half a stage's time, its first choice is right 79 times in 100."""
    model = EmulatedSpec(STAGES, 5000, 1, spread(0.79))
    request = Request(tuple(range(PROMPT)), TOKENS)
    spec = WorldSpec(1, policy, STAGES, (request,), model, draft_s=0.5, context=PROMPT + TOKENS)
    recorder = Recorder()
    World(spec, (recorder,)).run()
    return Job(make_job_spec(spec), recorder.trace)


def crowded(policy: Policy) -> Job:
    """CROWD requests at once over CROWD_STAGES stages. Their passes take next to nothing of the time that counts: the
    orchestrator gets its events as fast as it can take them."""
    rng = random.Random(0)
    requests = tuple(Request(tuple(rng.randrange(50) for _ in range(CROWD_PROMPT)), CROWD_TOKENS) for _ in range(CROWD))
    model = EmulatedSpec(CROWD_STAGES, 50, 1, spread(0.8))
    context = CROWD_PROMPT + CROWD_TOKENS
    spec = WorldSpec(0, policy, CROWD_STAGES, requests, model, draft_s=0.3, row_cost=0.05, context=context)
    recorder = Recorder()
    spec = replace(spec, at_once=True, max_num_seqs=CROWD)
    World(spec, (recorder,)).run()
    return Job(make_job_spec(spec), recorder.trace)


def traced(path: Path) -> Job:
    """What a rank of a real job wrote down (`pipeinfer run --trace`). Raises UserError."""
    trace = Trace(path)
    return Job(JobSpec.of(trace.header.job_spec), list(trace.steps()))


def role_of(step: Step) -> str:
    """Who was told."""
    if step.address == ORCHESTRATOR:
        return "orchestrator"
    return "drafter" if step.address >= FIRST_DRAFTER else "stage"


def kind_of(event: Event) -> str:
    """What was told."""
    return event.message.kind if isinstance(event, Received) else type(event).__name__
