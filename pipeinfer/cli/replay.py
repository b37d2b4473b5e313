"""``pipeinfer replay``: give the events of a trace to new machines, and compare their commands with the trace."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeinfer.core.errors import refuse

if TYPE_CHECKING:
    from pipeinfer.core.messages import Message
    from pipeinfer.core.ports import Command, Event
    from pipeinfer.runtime.request_times import RequestReader
    from pipeinfer.runtime.trace import Step, Trace


ITEMS = {"rows": "row", "ops": "operation", "nodes": "node", "tokens": "token", "offsets": "offset", "top": "top token"}
ITEMS |= {"next_tokens": "next token", "logit_bias": "biased token", "grammar": "grammar byte"}
"""What the lists of a message hold."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "replay",
        help="replay traces of a run, or show them",
        description="Replay traces that `pipeinfer run --trace FILE` left: build each rank's machines again, tell "
        "them what they were told, and compare what they command. Neither models nor MPI are needed. The exit code "
        "is 1 where anything differs. With the trace of the rank that led the job comes a table of its requests.",
    )
    parser.set_defaults(command=replay)
    parser.add_argument("files", nargs="+", metavar="FILE", help="a trace, or FILE for FILE.rank0, FILE.rank1, ...")
    parser.add_argument(
        "--show",
        action="store_true",
        help="first print all events in the order of time (in ms), a line each: what a role was told => what it "
        "commanded. Cancel 7 8/30 means run 7 and of run 8 the row at slot 30; Nodes of 3 are about sequence 3; "
        "lines with *** are decisions",
    )


def replay(args: argparse.Namespace) -> int:
    """Replay what ``args`` name; 1 where anything differs."""
    from pipeinfer.cli.request_table import table
    from pipeinfer.runtime.request_times import RequestReader
    from pipeinfer.runtime.trace import Trace

    traces = [Trace(path) for path in find(args.files)]
    if args.show:
        for line in show(traces):
            print(line)
    reader = RequestReader()
    code = max(check(trace, reader) for trace in traces)
    for line in table(reader.requests) if not code else ():
        print(line)
    return code


def find(names: Sequence[str]) -> Iterator[Path]:
    """The files that ``names`` mean. Files that other hosts hold are left out."""
    from pipeinfer.runtime.trace import Trace, rank_file

    for name in names:
        first = rank_file(name, 0)
        if Path(name).exists() or not first.exists():
            yield Path(name)
            continue
        files = [rank_file(name, rank) for rank in range(Trace(first).header.ranks)]
        yield from (file for file in files if file.exists())


def check(trace: Trace, reader: RequestReader) -> int:
    """Replay one trace and print the outcome in a line; 1 if anything differs. ``reader`` takes its requests."""
    from pipeinfer.core.addresses import address_name
    from pipeinfer.core.version import __version__
    from pipeinfer.runtime.job_spec import JobSpec
    from pipeinfer.runtime.replay import retell
    from pipeinfer.runtime.trace import DAMAGE

    header = trace.header
    try:
        job_spec = JobSpec.of(header.job_spec)
        machines = {address: job_spec.machine(address) for address in header.roles}
        names = role_names(trace)
    except (*DAMAGE, MemoryError) as error:
        refuse(f"the first line of {trace.path} is damaged ({type(error).__name__}: {error})", "use another trace")
    retold = retell(machines, reader.watch(trace.steps()))
    said = f"{trace.path} ({names or 'follows'}): {retold.events} events, {retold.commands} commands identical"
    if retold.difference:
        maker = "" if header.version == __version__ else f" (the trace was made by version {header.version})"
        print(f"{said}; then {retold.difference}{maker}", flush=True)
        return 1
    if trace.damage:
        said += f"; {trace.damage}, the rest is lost"
    elif left := [address_name(address) for address in header.roles if address not in retold.ended]:
        said += f"; then the trace ends, before {' and '.join(left)} did"
    print(said, flush=True)
    return 0


def show(traces: Sequence[Trace]) -> Iterator[str]:
    """The ranks of ``traces``, then their events in time order; times in milliseconds since the first event."""
    from pipeinfer.runtime.trace import in_order

    for trace in traces:
        header = trace.header
        layers = f", layers {header.layers[0]} to {header.layers[1] - 1}" if header.layers else ""
        policy = header.job_spec.get("policy", {}).get("name")
        yield f"rank {header.rank} of {header.ranks} on {header.host}: {role_names(trace)}{layers}, policy {policy}"
    for at_s, step in in_order(traces):
        yield from lines(step, 1e3 * at_s)


def role_names(trace: Trace) -> str:
    """The roles on the rank of ``trace``."""
    from pipeinfer.core.addresses import address_name

    return ", ".join(address_name(address) for address in trace.header.roles)


def lines(step: Step, at_ms: float) -> Iterator[str]:
    """One event as text: the event and its commands, then a line for each Note."""
    from pipeinfer.core.addresses import address_name
    from pipeinfer.core.ports import Note, Send

    start = f"{at_ms:12.3f}  {address_name(step.address):12}"
    told: dict[str, list[str]] = {}  # message and receiver
    for command in step.commands:
        if isinstance(command, Send):
            told.setdefault(message_text(command.message), []).append(address_name(command.message.dest))
        elif not isinstance(command, Note):
            told.setdefault(command_text(command, step.now), [])
    words = [f"{what} to {', '.join(dests)}" if dests else what for what, dests in told.items()]
    yield f"{start}  {event_text(step.event)}{' => ' if words else ''}{'; '.join(words)}"
    for command in step.commands:
        if isinstance(command, Note):
            yield f"{start}  *** {command.what}"


def event_text(event: Event) -> str:
    """An event as text."""
    from pipeinfer.core.addresses import address_name
    from pipeinfer.core.ports import Aborted, Computed, Received, Submitted

    if isinstance(event, Received):
        return f"{message_text(event.message)} from {address_name(event.message.source)}"
    if isinstance(event, Computed):
        if event.choices is not None:
            return f"computed {event.job}, {_many(len(event.choices), 'choice')}"
        return f"computed {event.job}" if event.hidden is not None else f"abandoned {event.job}"
    if isinstance(event, Submitted):
        request = event.request
        size = f"{_many(len(request.prompt), 'prompt token')}, {request.max_new_tokens} new"
        return f"submitted request {event.number}: {size}"
    if isinstance(event, Aborted):
        return f"aborted request {event.number}"
    return type(event).__name__.lower()


def command_text(command: Command, now: float) -> str:
    """A command at ``now`` as text, neither Send nor Note."""
    from pipeinfer.core.ports import Abandon, Compute, Emit, Finish, Idle, Score, Wake

    if isinstance(command, Compute):
        return f"compute {command.job} ({_rows(len(command.batch.tokens), len(command.batch.canonical))})"
    if isinstance(command, Abandon):
        return f"abandon {command.job}"
    if isinstance(command, Wake):
        return f"wake in {1e3 * (command.at - now):.3f}"
    if isinstance(command, Emit):
        return f"emit {_many(len(command.tokens), 'token')} of request {command.number}"
    if isinstance(command, Score):
        return f"score {_many(len(command.logps), 'token')} of request {command.number}"
    if isinstance(command, Finish):
        return f"finish request {command.number}: {command.reason}"
    return f"idle request {command.number}" if isinstance(command, Idle) else type(command).__name__.lower()


def message_text(message: Message) -> str:
    """A message without sender and receiver: kind, run, flags and sizes."""
    from pipeinfer.core.messages import NO_SLOT, Cancel, Credit, Result, Run, Status, Wants

    body, marks, carried = message.body, list[str](), list[str]()
    if isinstance(body, Cancel):
        marks += [f"{dead.run}" if dead.slot == NO_SLOT else f"{dead.run}/{dead.slot}" for dead in body.rows]
    elif isinstance(body, Run | Result | Credit | Status):
        marks.append(str(body.run))
    for name, value in zip(body._fields, body, strict=True):
        if value is True:
            marks.append(name.removeprefix("is_"))
        elif name == "sequence":
            marks.append(f"of {value}")
        elif name == "rows" and isinstance(body, Run | Result) and body.rows:
            carried.append(_rows(len(body.rows), len({row.sequence for row in body.rows})))
        elif isinstance(value, tuple) and value and not isinstance(body, Cancel):
            carried.append(_many(len(value), ITEMS[name]))
    if isinstance(body, Run) and body.wants is not Wants.EVERY and body.rows:
        marks.append(f"wants {body.wants.name.lower()}")
    if isinstance(body, Status):
        carried += [f"{body.waiting} waiting", f"{body.taken} taken"]
    words = " ".join([message.kind, *marks])
    return f"{words} ({', '.join(carried)})" if carried else words


def _rows(count: int, sequences: int) -> str:
    """Rows, and of how many sequences they are if these are several."""
    return _many(count, "row") if sequences < 2 else f"{_many(count, 'row')} of {sequences} sequences"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
