"""What the machines take per event: recorded jobs are told again to fresh machines, and each answer is timed. Of
several tellings the quickest counts, event by event: neighbours and other people's garbage can only take away. The
machines must answer as before, or nothing is said."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from benchmarks.profiling.costs import Cost, Stopwatch
from benchmarks.profiling.jobs import Job, kind_of, role_of
from pipeinfer.core.addresses import ORCHESTRATOR
from pipeinfer.core.ports import Command, Emit, Event, Machine, Received
from pipeinfer.runtime.replay import retell

ORCHESTRATOR_BUDGET_US = 50.0
TELLINGS = 5
RARE = 20
"""Kinds of events that came less often are left out."""


class _Timed:
    """``machine``, timed."""

    def __init__(self, machine: Machine, watch: Stopwatch) -> None:
        self.address = machine.address
        self._machine = machine
        self._watch = watch

    def handle(self, event: Event, now: float) -> list[Command]:
        if isinstance(event, Received):
            hash(event.message)  # looks at all of it: what has just been decoded is in the cache
        return self._watch(self._machine.handle, event, now)


def costs(name: str, job: Job) -> Iterator[Cost]:
    """By role: all events, then those of each kind, the most frequent first."""
    told = [_told(job) for _ in range(TELLINGS)]
    by_kind: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for step, *taken in zip(job.steps, *told, strict=True):
        for kind in ("all events", kind_of(step.event)):
            by_kind[role_of(step)][kind].append(min(taken))
    for role, kinds in sorted(by_kind.items(), reverse=True):
        for kind, us in sorted(kinds.items(), key=lambda item: -len(item[1])):
            has_budget = role == "orchestrator" and kind == "all events"
            if len(us) >= RARE:
                yield Cost(f"{name}: {role}, {kind}", us, ORCHESTRATOR_BUDGET_US if has_budget else None)


def per_token(name: str, job: Job, budget_us: float) -> Iterator[Cost]:
    """What the orchestrator of ``job`` takes for each token that it emits, all events together; how often they come and
    what those of each kind take."""
    mine = Job(job.job_spec, [step for step in job.steps if step.address == ORCHESTRATOR])
    emitted = [command for step in mine.steps for command in step.commands if isinstance(command, Emit)]
    tokens = sum(len(command.tokens) for command in emitted)
    taken = [min(us) for us in zip(*(_told(mine) for _ in range(TELLINGS)), strict=True)]
    yield Cost(f"{name}: orchestrator, a token", [sum(taken) / tokens], budget_us, is_per_token=True)
    by_kind: dict[str, list[float]] = defaultdict(list)
    for step, us in zip(mine.steps, taken, strict=True):
        by_kind[kind_of(step.event)].append(us)
    for kind, us_of_kind in sorted(by_kind.items(), key=lambda item: -sum(item[1])):
        if len(us_of_kind) >= RARE:
            yield Cost(f"{name}: orchestrator, {kind}", us_of_kind)


def _told(job: Job) -> list[float]:
    """Microseconds of each event."""
    watch = Stopwatch()
    addresses = {step.address for step in job.steps}
    retold = retell({address: _Timed(job.job_spec.machine(address), watch) for address in addresses}, job.steps)
    if retold.difference:
        raise SystemExit(f"this is not how it was: {retold.difference}")
    return watch.us
