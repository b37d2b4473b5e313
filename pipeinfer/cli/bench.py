"""``pipeinfer bench``: measure a suite with real weights, emulated over MPI, or simulated."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from launch.cores import alone, refuse_threads
from launch.environment import launched, refuse_singletons
from pipeinfer.core.config import BUILTIN
from pipeinfer.core.errors import refuse

if TYPE_CHECKING:
    from pipeinfer.bench.suite import Suite

KERNELS = "kernels"
EXCHANGES = "fused"
"""Takes the place of a suite: linears and passes on this process's cores, without ranks."""


REAL_ONLY = ("dtype", "numerics", "activations", "threads")
"""Options that mean something where real models compute."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "bench",
        help="measure a suite of policies and points",
        description="Measure every policy of SUITE at each point of SUITE and check all tokens. Under mpirun or srun "
        "the job's ranks are used; otherwise the command starts the necessary ranks on this machine.",
    )
    parser.set_defaults(command=bench)
    parser.add_argument(
        "suite",
        metavar="SUITE",
        help=f"a TOML file, or the name of one in benchmarks/suites; or {KERNELS}: linears and passes on this machine",
    )
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
    parser.add_argument("--target", metavar="MODEL", help="the target of every point, instead of the suite's (real)")
    parser.add_argument("--draft", metavar="MODEL", help="the draft of every point, instead of the suite's (real)")
    parser.add_argument("--prompts", type=int, metavar="K", help="requests of a sample (real)")
    parser.add_argument("--dtype", metavar="auto|fp32|bf16|fp16", help="type of weights, instead of the suite's (real)")
    parser.add_argument("--numerics", metavar="portable|fast", help="see `pipeinfer run` (real)")
    parser.add_argument("--activations", metavar="fp32|int8", help="see `pipeinfer run` (real)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of each rank (real)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row instead of a table")
    parser.add_argument("--out", metavar="DIR", help="also write the rows to DIR/SUITE.EXECUTION.jsonl")


def bench(args: argparse.Namespace) -> int:
    """Measure as ``args`` say."""
    if args.suite == KERNELS:
        return bench_kernels(args)
    if args.suite == EXCHANGES:
        return bench_exchanges(args)
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


def bench_kernels(args: argparse.Namespace) -> int:
    """Measure the kernels with as many threads as this process may have."""
    from pipeinfer.bench.kernels import heading, line, measure

    launch = launched()
    if launch is not None and not launch.leads:
        return 0
    refuse_threads(args.threads)
    threads = alone(args.threads)
    if not args.json:
        print(heading(), flush=True)
    for row in measure(threads):
        print(json.dumps(row) if args.json else line(row), flush=True)
    return 0


def bench_exchanges(args: argparse.Namespace) -> int:
    """Measure the exchanges of a group of as many ranks as are asked for."""
    launch, ranks = launched(), args.ranks or 2
    if not 2 <= ranks <= 8:
        refuse(f"--ranks {ranks}", "use 2 to 8 for a group")
    if launch is None:
        from launch.mpiexec import start_again

        return start_again(ranks, args.argv)
    from launch.mpi import World

    world = World()
    try:
        if world.size != ranks:
            refuse(f"{world.size} ranks for a group of {ranks}", "start as many, or choose with --ranks")
        from pipeinfer.bench.fused import heading, line
        from pipeinfer.bench.fused import measure as measure_exchanges

        if world.is_head and not args.json:
            print(heading(), flush=True)
        for row in measure_exchanges(world, ranks):
            if world.is_head:
                print(json.dumps(row) if args.json else line(row), flush=True)
    except BaseException as error:
        world.fail(error)
    world.close()
    return 0


def measure(suite: Suite, args: argparse.Namespace, world: Any) -> None:
    """Measure ``suite`` on the ranks of ``world``. Collective."""
    from pipeinfer.bench.report import Report
    from pipeinfer.bench.runner import run_emulated, run_real

    fitting = tuple(point for point in suite.points if point.processes(suite.execution) <= world.size)
    if not fitting:
        most = min(point.processes(suite.execution) for point in suite.points)
        refuse(f"{suite.name} needs {most} ranks, and there are {world.size}", "start more, or choose with --ranks")
    report = Report(suite, args.json, args.out) if world.is_head else None
    if report is not None and len(fitting) < len(suite.points):
        report.say(f"{len(suite.points) - len(fitting)} points need more than the {world.size} ranks there are")
    run = run_real if suite.execution == "real" else run_emulated
    run(replace(suite, points=fitting), report, world)


def wanted(args: argparse.Namespace) -> Suite:
    """The suite, changed by ``args``. Raises UserError for an unknown suite or policy."""
    from pipeinfer.bench.contenders import contender
    from pipeinfer.bench.peers import check_peers, is_peer
    from pipeinfer.bench.suite import read_suite

    suite = read_suite(args.suite)
    refuse_threads(args.threads)
    given = ("ranks", "tokens", "prompts", *REAL_ONLY)
    changes = {name: getattr(args, name) for name in given if getattr(args, name) is not None}
    suite = replace(suite, execution=args.execution or suite.execution)
    for name in REAL_ONLY:
        if name in changes and suite.execution != "real":
            refuse(f"--{name} without real weights", f"nothing computes in {suite.execution} suites; use --real")
    for name, value in changes.items():
        if name in REAL_ONLY:
            continue
        if value < (2 if name == "tokens" else 1):
            refuse(f"--{name} {value}", "use more")
    changes |= models(args, suite)
    points = tuple(dict.fromkeys(replace(point, **changes) for point in suite.points))
    suite = replace(suite, points=points)
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
    check_peers(suite.policies)
    return suite


def models(args: argparse.Namespace, suite: Suite) -> dict[str, str]:
    """The models that ``args`` name in place of those of ``suite``. Raises UserError for a directory without one."""
    from stages.checkpoint.model_config import model_config

    given = {key: getattr(args, key) for key in ("target", "draft") if getattr(args, key) is not None}
    for key, name in given.items():
        if suite.execution != "real":
            refuse(f"--{key} {name} with a suite that is {suite.execution}", "use --real")
        if name != BUILTIN:
            model_config(name)
    if "target" in given and "draft" not in given:
        refuse("--target without --draft", "name both: a pair")
    return given


def start(suite: Suite, argv: list[str]) -> int:
    """Start the ranks that ``suite`` needs on this machine, each with the command line ``argv``."""
    from launch.mpiexec import start_again

    ranks = max(point.processes(suite.execution) for point in suite.points)
    if not ranks:
        refuse(f"{suite.name} does not say how many ranks", "choose with --ranks, or start it with mpirun or srun")
    return start_again(ranks, argv)
