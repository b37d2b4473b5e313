"""What the wire and the slots take, on what a recorded job sent and leased."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.profiling.costs import Cost, Stopwatch
from benchmarks.profiling.jobs import Job
from kvbuffers.slot_table import SlotTable
from pipeinfer.core.addresses import FIRST_STAGE, ORCHESTRATOR
from pipeinfer.core.messages import Cancel, Credit, Message, Nodes, Result, Run
from pipeinfer.core.ports import Received
from pipeinfer.core.wire import decode, encode
from pipeinfer.orchestrator.machine import Orchestrator
from pipeinfer.runtime.replay import retell

KINDS = (Run, Result, Nodes, Credit, Cancel)
ROWS = 8
"""Of the runs that are shown."""
REPEATS = 2000
TELLINGS = 5
TIMED = ("operations", "lease", "commit", "release", "free", "fork")
"""Methods of the leader's allocator that are shown."""


def wire(job: Job) -> Iterator[Cost]:
    """Encoding and decoding the message of middle length of each kind."""
    sent = [step.event.message for step in job.steps if isinstance(step.event, Received)]
    for kind in KINDS:
        mine = sorted((message for message in sent if type(message.body) is kind and _is_typical(message)), key=_nbytes)
        message = mine[len(mine) // 2]
        packing, unpacking = Stopwatch(), Stopwatch()
        for _ in range(REPEATS):
            unpacking(decode, packing(encode, message))
        counts = [f"{len(items)} {name}" for name, items in message.body._asdict().items() if isinstance(items, tuple)]
        what = ", ".join([kind.__name__, *counts])
        yield Cost(f"wire: encode {what}", packing.us)
        yield Cost(f"wire: decode {what}", unpacking.us)


def _is_typical(message: Message) -> bool:
    body = message.body
    if isinstance(body, Run):
        return len(body.rows) == ROWS and bool(body.ops)
    return isinstance(body, Credit) or any(isinstance(items, tuple) and items for items in body)


def _nbytes(message: Message) -> int:
    return len(encode(message))


def slot_table(job: Job) -> Iterator[Cost]:
    """A stage's table and the leader's allocator, through all runs of a job; runs of 8 rows are shown."""
    events = [step.event for step in job.steps if step.address == FIRST_STAGE and isinstance(step.event, Received)]
    runs = [event.message.body for event in events if isinstance(event.message.body, Run)]
    us: dict[str, list[float]] = {}
    for _ in range(TELLINGS):
        for run, found in zip(runs, _through(job, runs), strict=True):
            if len(run.rows) == ROWS and not run.is_canonical:
                for what, taken in found.items():
                    us.setdefault(what, []).append(taken)
    for what, taken in us.items():
        yield Cost(f"{what}, runs of {ROWS} rows", taken)
    yield from _leading(job)


def _through(job: Job, runs: list[Run]) -> Iterator[dict[str, float]]:
    """What each operation of a stage's table took for each of ``runs``."""
    table, watch = SlotTable(sum(job.job_spec.slots)), Stopwatch()
    for run in runs:
        watch.us.clear()
        watch(table.apply, run.ops)
        watch(table.living, run.rows)
        watch(table.allocate, run.rows, canonical=run.is_canonical)
        yield dict(zip(("slots: apply", "slots: living", "slots: allocate"), watch.us, strict=True))


def _leading(job: Job) -> Iterator[Cost]:
    """What the allocator took when the orchestrator of ``job`` was told everything again. In which order slots are
    leased to several sequences only the orchestrator knows."""
    told = [step for step in job.steps if step.address == ORCHESTRATOR]
    us: dict[str, list[float]] = {name: [] for name in TIMED}
    for _ in range(TELLINGS):
        machine = job.job_spec.machine(ORCHESTRATOR)
        assert isinstance(machine, Orchestrator)
        watches = {name: Stopwatch() for name in TIMED}
        for name, watch in watches.items():
            setattr(machine._allocator, name, partial(watch, getattr(machine._allocator, name)))
        retold = retell({ORCHESTRATOR: machine}, told)
        assert not retold.difference, f"this is not what the leader did: {retold.difference}"
        for name, watch in watches.items():
            us[name] += watch.us
    for name, taken in us.items():
        if taken:
            yield Cost(f"allocator: {name}", taken)
