"""What the wire and the slots take, on what a recorded job sent and leased."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.profiling.costs import Cost, Stopwatch
from benchmarks.profiling.jobs import Job
from kvbuffers.slot_allocator import SlotAllocator
from kvbuffers.slot_table import SlotTable
from pipeinfer.core.addresses import FIRST_STAGE
from pipeinfer.core.messages import Cancel, Credit, Message, Nodes, Result, Run, SlotOpKind
from pipeinfer.core.ports import Received
from pipeinfer.core.wire import decode, encode

KINDS = (Run, Result, Nodes, Credit, Cancel)
ROWS = 8
"""Of the runs that are shown."""
REPEATS = 2000
TELLINGS = 5


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
    """A stage's table and the leader's allocator, through all runs of a job; those of 8 rows are shown."""
    events = [step.event for step in job.steps if step.address == FIRST_STAGE and isinstance(step.event, Received)]
    runs = [event.message.body for event in events if isinstance(event.message.body, Run)]
    us: dict[str, list[float]] = {}
    for _ in range(TELLINGS):
        for run, found in zip(runs, _through(job, runs), strict=True):
            if len(run.rows) == ROWS:
                for what, taken in found.items():
                    us.setdefault(what, []).append(taken)
    for what, taken in us.items():
        yield Cost(f"{what}, runs of {ROWS} rows", taken)


def _through(job: Job, runs: list[Run]) -> Iterator[dict[str, float]]:
    """What each operation took for each of ``runs``."""
    accepted, guesses = job.job_spec.slots
    table, allocator, watch = SlotTable(accepted + guesses), SlotAllocator(accepted, guesses), Stopwatch()
    for run in runs:
        rows, sequence = run.rows, run.rows[0].sequence if run.rows else 0
        watch.us.clear()
        watch(table.apply, run.ops)
        watch(table.living, rows)
        watch(table.allocate, rows, canonical=run.is_canonical)
        if run.is_canonical:
            allocator.prompt_rows(sequence, [row.token for row in rows])
            yield {}
            continue
        for op in run.ops:  # what the leader did since the last run
            if op.kind is SlotOpKind.FREE:
                allocator.free(op.sequence)
                continue
            act = allocator.commit if op.kind is SlotOpKind.COMMIT else allocator.release
            for slot in range(op.slot, op.slot + op.length):
                act(op.sequence, slot)
        ops = watch(allocator.operations)
        slots = watch(allocator.lease, sequence, len(rows))
        assert (ops, sorted(slots)) == (run.ops, sorted(row.slot for row in rows)), "this is not what the leader did"
        names = ("slots: apply", "slots: living", "slots: allocate", "allocator: operations", "allocator: lease")
        yield dict(zip(names, watch.us, strict=True))
