"""``pipeinfer replay``: tell fresh machines what a trace says that others were told, and compare what they command."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeinfer.core.errors import refuse

if TYPE_CHECKING:
    from pipeinfer.core.ports import Command, Event
    from pipeinfer.core.protocol import Message
    from pipeinfer.runtime.trace import Step, Trace


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "replay",
        help="replay traces of a run, or show them",
        description="Replay traces that `pipeinfer run --trace FILE` left: build each rank's machines again, tell "
        "them what they were told, and compare what they command. Neither models nor MPI are needed. The exit code "
        "is 1 where anything differs.",
    )
    parser.set_defaults(command=replay)
    parser.add_argument("files", nargs="+", metavar="FILE", help="a trace, or FILE for FILE.rank0, FILE.rank1, ...")
    parser.add_argument(
        "--show",
        action="store_true",
        help="first print all events in the order of time (in ms), a line each: what a role was told => what it "
        "commanded. CANCEL 7 8/30 means run 7 and of run 8 the row at slot 30; lines with *** are decisions",
    )


def replay(args: argparse.Namespace) -> int:
    """Replay what ``args`` name; 1 where anything differs."""
    from pipeinfer.runtime.trace import Trace

    traces = [Trace(path) for path in find(args.files)]
    if args.show:
        for line in show(traces):
            print(line)
    return max(check(trace) for trace in traces)


def find(names: Sequence[str]) -> Iterator[Path]:
    """The files that ``names`` mean. A job's ranks may have written on hosts of their own: what is not here is left
    out."""
    from pipeinfer.runtime.trace import Trace, rank_file

    for name in names:
        first = rank_file(name, 0)
        if Path(name).exists() or not first.exists():
            yield Path(name)
            continue
        files = [rank_file(name, rank) for rank in range(Trace(first).header.ranks)]
        yield from (file for file in files if file.exists())


def check(trace: Trace) -> int:
    """Replay one trace and say in a line what came of it; 1 where anything differs."""
    from pipeinfer import __version__
    from pipeinfer.core.protocol import address_name
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
    retold = retell(machines, trace.steps())
    said = f"{trace.path} ({names}): {retold.events} events, {retold.commands} commands identical"
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
    """Whose ``traces`` they are, then their events in the order of time; times in milliseconds since the first one."""
    from pipeinfer.runtime.trace import in_order

    for trace in traces:
        header = trace.header
        layers = f", layers {header.layers[0]} to {header.layers[1] - 1}" if header.layers else ""
        policy = header.job_spec.get("policy", {}).get("name")
        yield f"rank {header.rank} of {header.ranks} on {header.host}: {role_names(trace)}{layers}, policy {policy}"
    for at_s, step in in_order(traces):
        yield from lines(step, 1e3 * at_s)


def role_names(trace: Trace) -> str:
    """Who plays on the rank of ``trace``."""
    from pipeinfer.core.protocol import address_name

    return ", ".join(address_name(address) for address in trace.header.roles)


def lines(step: Step, at_ms: float) -> Iterator[str]:
    """One event as people read it: what came and what was commanded, then a line for each Note."""
    from pipeinfer.core.ports import Note, Send
    from pipeinfer.core.protocol import address_name

    start = f"{at_ms:12.3f}  {address_name(step.address):12}"
    told: dict[str, list[str]] = {}  # what is said to whom
    for command in step.commands:
        if isinstance(command, Send):
            told.setdefault(message_words(command.message), []).append(address_name(command.message.dest))
        elif not isinstance(command, Note):
            told.setdefault(command_words(command, step.now), [])
    words = [f"{what} to {', '.join(dests)}" if dests else what for what, dests in told.items()]
    yield f"{start}  {event_words(step.event)}{' => ' if words else ''}{'; '.join(words)}"
    for command in step.commands:
        if isinstance(command, Note):
            yield f"{start}  *** {command.what}"


def event_words(event: Event) -> str:
    """What a role was told."""
    from pipeinfer.core.ports import Computed, Received, Submitted
    from pipeinfer.core.protocol import address_name

    if isinstance(event, Received):
        return f"{message_words(event.message)} from {address_name(event.message.source)}"
    if isinstance(event, Computed):
        if event.choices is not None:
            return f"computed {event.job}, {_many(len(event.choices), 'choice')}"
        return f"computed {event.job}" if event.hidden is not None else f"abandoned {event.job}"
    if isinstance(event, Submitted):
        request = event.request
        return f"submitted: {_many(len(request.prompt), 'prompt token')}, {request.max_new_tokens} new"
    return type(event).__name__.lower()


def command_words(command: Command, now: float) -> str:
    """What a role commanded at ``now``, if it is neither Send nor Note."""
    from pipeinfer.core.ports import Abandon, Compute, Emit, Finish, Wake

    if isinstance(command, Compute):
        return f"compute {command.job} ({_many(len(command.batch.tokens), 'row')})"
    if isinstance(command, Abandon):
        return f"abandon {command.job}"
    if isinstance(command, Wake):
        return f"wake in {1e3 * (command.at - now):.3f}"
    if isinstance(command, Emit):
        return f"emit {_many(len(command.tokens), 'token')}"
    return f"finish: {command.reason}" if isinstance(command, Finish) else type(command).__name__.lower()


def message_words(message: Message) -> str:
    """A message without its ends: kind, run, flags, and how much it carries."""
    from pipeinfer.core.protocol import NO_SLOT, Flag, Kind, Row

    words = message.kind.name
    if message.kind in (Kind.RUN, Kind.RESULT, Kind.CREDIT, Kind.STATUS):
        words += f" {message.run}"
    if message.kind is Kind.CANCEL:
        rows = message.rows_as(Row)
        words += " " + " ".join(f"{row.slot}" if row.parent == NO_SLOT else f"{row.slot}/{row.parent}" for row in rows)
    words += "".join(f" {flag.name}" for flag in Flag if flag in message.flags)
    carried = [_many(len(message.rows), "row")] if message.rows and message.kind is not Kind.CANCEL else []
    carried += [_many(len(message.ops), "operation")] if message.ops else []
    if message.kind is Kind.STATUS:
        carried += [f"{message.epoch} waiting", f"{message.txn} taken"]
    return f"{words} ({', '.join(carried)})" if carried else words


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
