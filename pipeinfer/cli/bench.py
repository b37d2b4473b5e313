"""``pipeinfer bench``: measure a suite with real weights, emulated over MPI, or simulated."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launch.environment import launched, refuse_singletons
from pipeinfer.core.errors import refuse

if TYPE_CHECKING:
    from pipeinfer.bench.suite import Suite


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "bench",
        help="measure a suite of policies and points",
        description="Measure every policy of SUITE at each point of SUITE and check all tokens. Under mpirun or srun "
        "the job's ranks are used; otherwise the command starts the necessary ranks on this machine.",
    )
    parser.set_defaults(command=bench)
    parser.add_argument("suite", metavar="SUITE", help="a TOML file, or the name of one in benchmarks/suites")
    how = parser.add_mutually_exclusive_group()
    for execution, meaning in (
        ("real", "real weights, wall-clock time"),
        ("emulated", "real ranks and messages; hash chains as models; paced stages and links"),
        ("simulated", "virtual time, without MPI"),
    ):
        flag = {"real": "--real", "emulated": "--emulate", "simulated": "--simulate"}[execution]
        how.add_argument(flag, dest="execution", action="store_const", const=execution, help=meaning)
    parser.add_argument("--policies", metavar="A,B,...", help="policies instead of the suite's: names, files or peers")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks of every point, instead of the suite's")
    parser.add_argument("--repeats", type=int, metavar="R", help="samples of each policy at each point")
    parser.add_argument("--tokens", type=int, metavar="K", help="new tokens of a request")
    parser.add_argument("--prompts", type=int, metavar="K", help="requests of a sample (real)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row instead of a table")
    parser.add_argument("--out", metavar="DIR", help="also write the rows to DIR/SUITE.EXECUTION.jsonl")


def bench(args: argparse.Namespace) -> int:
    """Measure as ``args`` say."""
    suite = wanted(args)
    launch = launched()
    if suite.execution == "simulated":
        if launch is None or launch.leads:
            from pipeinfer.bench.report import Report
            from pipeinfer.bench.runner import run_simulated

            run_simulated(suite, Report(suite, args.json, args.out))
        return 0
    if launch is None:
        return start(suite, args.argv)
    from launch.mpi import World

    world = World()
    refuse_singletons(launch, world.size)
    try:
        measure(suite, args, world)
    except BaseException as error:
        world.fail(error)
    world.close()
    return 0


def measure(suite: Suite, args: argparse.Namespace, world: Any) -> None:
    """Measure ``suite`` on the ranks of ``world``. Collective."""
    from pipeinfer.bench.report import Report
    from pipeinfer.bench.runner import run_emulated, run_real

    fitting = tuple(point for point in suite.points if point.ranks <= world.size)
    if not fitting:
        most = min(point.ranks for point in suite.points)
        refuse(f"{suite.name} needs {most} ranks, and there are {world.size}", "start more, or choose with --ranks")
    report = Report(suite, args.json, args.out) if world.is_head else None
    if report is not None and len(fitting) < len(suite.points):
        report.say(f"{len(suite.points) - len(fitting)} points need more than the {world.size} ranks there are")
    run = run_real if suite.execution == "real" else run_emulated
    run(replace(suite, points=fitting), report, world)


def wanted(args: argparse.Namespace) -> Suite:
    """The suite, changed by ``args``. Raises UserError for an unknown suite or policy."""
    from pipeinfer.bench.contenders import contender
    from pipeinfer.bench.peers import is_peer
    from pipeinfer.bench.suite import read_suite

    suite = read_suite(args.suite)
    changes = {name: getattr(args, name) for name in ("ranks", "tokens", "prompts") if getattr(args, name) is not None}
    for name, value in changes.items():
        if value < (2 if name == "tokens" else 1):
            refuse(f"--{name} {value}", "use more")
    points = tuple(dict.fromkeys(replace(point, **changes) for point in suite.points))
    suite = replace(suite, points=points, execution=args.execution or suite.execution)
    if args.repeats is not None:
        if args.repeats < 1:
            refuse(f"--repeats {args.repeats}", "use at least one")
        suite = replace(suite, repeats=args.repeats)
    if args.policies:
        suite = replace(suite, policies=tuple(args.policies.split(",")))
    for name in suite.policies:
        if not is_peer(name):
            contender(name)
        elif suite.execution != "real":
            refuse(f"{name} decodes real weights only", "leave it out with --policies, or use --real")
    if all(map(is_peer, suite.policies)):
        refuse("only peers", "name a policy of ours too: they are measured beside it")
    return suite


def start(suite: Suite, argv: list[str]) -> int:
    """Start the ranks that ``suite`` needs on this machine, each with the command line ``argv``."""
    from launch.mpiexec import start_again

    ranks = max(point.ranks for point in suite.points)
    if not ranks:
        refuse(f"{suite.name} does not say how many ranks", "choose with --ranks, or start it with mpirun or srun")
    return start_again(ranks, argv)
