"""Where the time goes: microseconds of this project's own Python, part by part, beside what it may take.

    python -m benchmarks.profile                    about a minute; --json: one row a line
    python -m benchmarks.profile --only layers      one part: machines, crowds, tables, ranks or layers
    python -m benchmarks.profile --trace FILE       the machines of a real job's rank, from its trace

machines  per event of a simulated job of 8 stages, replayed; the orchestrator's mean has a limit
crowds    the orchestrator of 64 requests at once over 4 stages: what a token takes, and so how many one core can lead
tables    the wire's encoding and decoding, and operations on slots, on that job's messages
ranks     what a stage on an MPI rank of its own takes around its layers, for each run
layers    what a Llama shard's layer takes beside its kernels

Processor time of one thread: nobody waits in it. Beside busy neighbours all of it grows, as caches are shared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.profiling import jobs, machines, tables
from benchmarks.profiling.costs import Cost, heading
from launch.mpiexec import command
from pipeinfer.bench.fingerprint import fingerprint
from pipeinfer.core.errors import PipeinferError
from speculation.schedules.policy import CONTINUOUS, PLAIN, read_policy

SYNC_TREE = Path(__file__).parent / "baselines" / "sync-tree.toml"
CROWD_BUDGETS_US = ((PLAIN, 60.0), (CONTINUOUS, 200.0))


def of_machines() -> Iterator[Cost]:
    """The machines of three policies."""
    for policy in (CONTINUOUS, PLAIN, read_policy(str(SYNC_TREE))):
        yield from machines.costs(policy.name, jobs.simulated(policy))


def of_crowds() -> Iterator[Cost]:
    """The orchestrator of many requests, of two policies."""
    for policy, budget_us in CROWD_BUDGETS_US:
        yield from machines.per_token(f"{policy.name}, {jobs.CROWD} at once", jobs.crowded(policy), budget_us)


def of_tables() -> Iterator[Cost]:
    """The wire and the slots."""
    job = jobs.simulated(CONTINUOUS)
    yield from tables.wire(job)
    yield from tables.slot_table(job)


def of_ranks() -> Iterator[Cost]:
    """A stage on a rank of its own."""
    line, environ = command(2, [sys.executable, "-m", "benchmarks.profiling.ranks"])
    told = subprocess.run(line, env=environ, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    yield from (Cost(**fields) for fields in json.loads(told.stdout))


def of_layers() -> Iterator[Cost]:
    """The Llama shard."""
    from benchmarks.profiling import layers

    yield from layers.costs()


PARTS: dict[str, Callable[[], Iterator[Cost]]] = {
    "machines": of_machines,
    "crowds": of_crowds,
    "tables": of_tables,
    "ranks": of_ranks,
    "layers": of_layers,
}


def main() -> int:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, help="one part (default: all)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a trace's machines instead")
    parser.add_argument("--json", action="store_true", help="JSON, one object a line")
    args = parser.parse_args()
    try:
        return report(found(args.only, args.trace), args.json)
    except PipeinferError as error:
        print(f"benchmarks.profile: {error}", file=sys.stderr)
        return error.exit_code


def found(only: str | None, trace: Path | None) -> Iterator[Cost]:
    """The costs of one part or of all, or of what happened in ``trace``."""
    if trace is not None:
        yield from machines.costs(trace.name, jobs.traced(trace))
        return
    for name, part in PARTS.items():
        if only in (None, name):
            yield from part()


def report(costs: Iterator[Cost], as_json: bool) -> int:
    """Print ``costs`` as they come; 1 if one is over its budget."""
    machine, is_over = fingerprint({}, ""), False
    if not as_json:
        print(f"# {machine['cpu']}, {machine['cores']} cores; Python {machine['python']}, torch {machine['torch']}")
        print(heading())
    for cost in costs:
        row = {"suite": "profile", **cost.row(), "fingerprint": machine}
        is_over |= not row["ok"]
        print(json.dumps(row) if as_json else cost.line(), flush=True)
    return int(is_over)


if __name__ == "__main__":
    sys.exit(main())
