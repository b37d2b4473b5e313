"""What the wire and the slots take, on what a recorded job sent and leased."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.profiling.costs import Cost, Stopwatch
from benchmarks.profiling.jobs import Job
from kvbuffers.slot_allocator import SlotAllocator
from kvbuffers.slot_table import SlotTable
from pipeinfer.core.ports import Received
from pipeinfer.core.protocol import FIRST_STAGE, Flag, Kind, Message, Row, SlotOpKind, decode, encode

KINDS = (Kind.RUN, Kind.RESULT, Kind.NODES, Kind.CREDIT, Kind.CANCEL)
ROWS = 8
"""Of the runs that are shown."""
REPEATS = 2000
TELLINGS = 5


def wire(job: Job) -> Iterator[Cost]:
    """Encoding and decoding the message of middle length of each kind."""
    sent = [step.event.message for step in job.steps if isinstance(step.event, Received)]
    for kind in KINDS:
        mine = sorted((message for message in sent if message.kind is kind and _is_typical(message)), key=_nbytes)
        message = mine[len(mine) // 2]
        packing, unpacking = Stopwatch(), Stopwatch()
        for _ in range(REPEATS):
            unpacking(decode, packing(encode, message))
        what = f"{kind.name}, {len(message.rows)} rows, {len(message.ops)} operations"
        yield Cost(f"wire: encode {what}", packing.us)
        yield Cost(f"wire: decode {what}", unpacking.us)


def _is_typical(message: Message) -> bool:
    if message.kind is Kind.RUN:
        return len(message.rows) == ROWS and bool(message.ops)
    return bool(message.rows) or message.kind is Kind.CREDIT


def _nbytes(message: Message) -> int:
    return len(encode(message))


def slot_table(job: Job) -> Iterator[Cost]:
    """A stage's table and the leader's allocator, through all runs of a job; those of 8 rows are shown."""
    events = [step.event for step in job.steps if step.address == FIRST_STAGE and isinstance(step.event, Received)]
    runs = [event.message for event in events if event.message.kind is Kind.RUN]
    us: dict[str, list[float]] = {}
    for _ in range(TELLINGS):
        for run, found in zip(runs, _through(job, runs), strict=True):
            if len(run.rows) == ROWS:
                for what, taken in found.items():
                    us.setdefault(what, []).append(taken)
    for what, taken in us.items():
        yield Cost(f"{what}, runs of {ROWS} rows", taken)


def _through(job: Job, runs: list[Message]) -> Iterator[dict[str, float]]:
    """What each operation took for each of ``runs``."""
    accepted, guesses = job.job_spec.slots
    table, allocator, watch = SlotTable(accepted + guesses), SlotAllocator(accepted, guesses), Stopwatch()
    for run in runs:
        rows = run.rows_as(Row)
        watch.us.clear()
        watch(table.apply, run.ops)
        watch(table.living, rows)
        watch(table.allocate, rows, canonical=bool(run.flags & Flag.CANONICAL))
        if run.flags & Flag.CANONICAL:
            allocator.prompt_rows([row.token for row in rows])
            yield {}
            continue
        for op in run.ops:  # what the leader did since the last run
            if op.kind is not SlotOpKind.CLEAR:
                act = allocator.commit if op.kind is SlotOpKind.COMMIT else allocator.release
                for slot in range(op.slot, op.slot + op.length):
                    act(slot)
        ops = watch(allocator.operations)
        slots = watch(allocator.lease, len(rows))
        assert (ops, sorted(slots)) == (run.ops, sorted(row.slot for row in rows)), "this is not what the leader did"
        names = ("slots: apply", "slots: living", "slots: allocate", "allocator: operations", "allocator: lease")
        yield dict(zip(names, watch.us, strict=True))
