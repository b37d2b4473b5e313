"""``pipeinfer doctor``: report software and hardware, measure them, and validate the cost model."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.cores import refuse_threads
from launch.environment import launched
from pipeinfer.core.errors import refuse

if TYPE_CHECKING:
    from launch.mpi import World

SMALL_NBYTES, LARGE_NBYTES = 8, 1 << 22
SMALL_TRIPS, LARGE_TRIPS, TRIALS = 1000, 50, 3
"""Most round trips with each rank, and trial trips that determine how many there is time for."""
LINKS_S = 2.5
"""Seconds for the round trips of one size, with all ranks together."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "doctor",
        help="report software and hardware, or measure them",
        description="Report software, ranks and cores; or measure this machine and write a hardware description for "
        "`pipeinfer bench`; or compare the cost model with real passes.",
    )
    parser.set_defaults(command=doctor)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--measure",
        action="store_true",
        help="measure memory, arithmetic and links and write a hardware description (less than a minute, also on a "
        "slow machine, which then has fewer and smaller samples). The measured links are those between rank 0 and the "
        "other ranks: start the command with mpirun or srun, one rank per node; otherwise two ranks start here",
    )
    what.add_argument(
        "--validate", metavar="HARDWARE", help="compare the pass times that HARDWARE predicts with passes on this host"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="with --measure or --validate: torch's name of the device, for instance cuda (default: cpu)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="with --measure: time for measuring, without starting ranks and measuring links (default: 30)",
    )
    parser.add_argument("--out", metavar="FILE", help="with --measure: write to FILE (default: standard output)")
    parser.add_argument("--target", metavar="MODEL", help="with --validate: the model (default: the built-in target)")
    parser.add_argument("--threads", type=int, metavar="N", help="report or measure with N threads a rank")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def doctor(args: argparse.Namespace) -> int:
    """Do what ``args`` say."""
    of_measure = {"--out": args.out, "--seconds": args.seconds}
    for name, given in {**of_measure, "--target": args.target}.items():
        needed = "--measure" if name in of_measure else "--validate"
        if given is not None and not (args.measure if name in of_measure else args.validate):
            refuse(f"{name} without {needed}", "say both, or neither")
    if args.seconds is not None and not 0 < args.seconds < math.inf:
        refuse(f"--seconds {args.seconds:g}", "give a number above 0")
    refuse_threads(args.threads)
    if args.threads and args.validate:
        refuse("--threads with --validate", "the hardware description says how many")
    if args.device != "cpu":
        from pipeinfer.bench.passes import check_device

        if not (args.measure or args.validate):
            refuse("--device without --measure or --validate", "say one of them too, or leave it out")
        check_device(args.device)
    if args.json and args.measure:
        refuse("--json with --measure", "a hardware description is TOML")
    if args.measure:
        return measure(args)
    launch = launched()
    if args.validate:
        return validate(args) if launch is None or launch.leads else 0
    from pipeinfer.cli.installation import facts, table, world

    with world() as here:
        found = facts(here, args.threads)
    if launch is None or launch.leads:
        print(json.dumps(found) if args.json else "\n".join(table(found)), flush=True)
    return 0


def measure(args: argparse.Namespace) -> int:
    """Measure this host and its links, on the ranks of the job or on two of our own."""
    if args.out and not Path(args.out).resolve().parent.is_dir():
        refuse(f"{args.out} cannot be written", "name a file in a directory that exists")
    if launched() is None:
        from launch.mpiexec import start_again

        return start_again(2, args.argv)
    from pipeinfer.bench.fingerprint import fingerprint
    from pipeinfer.bench.measure import SECONDS, describe
    from pipeinfer.cli.installation import world
    from pipeinfer.core.files import write_whole

    with world() as here:
        assert not isinstance(here, str), "a launcher means MPI"
        if here.size < 2:
            refuse("one rank has no link to measure", "start at least two")
        latency_s, large_s = best_trip_s(here, SMALL_NBYTES, SMALL_TRIPS), best_trip_s(here, LARGE_NBYTES, LARGE_TRIPS)
        if here.is_head:
            link = link_of(latency_s, large_s)
            cpu, threads = fingerprint({}, "")["cpu"], args.threads or here.threads
            described = describe(cpu, threads, link, args.device, args.seconds or SECONDS)
            if args.out:
                write_whole(args.out, described)
            else:
                print(described, end="", flush=True)
        here.agree(0)  # the other ranks sleep until now
    return 0


def link_of(small_s: float, large_s: float) -> tuple[float, float]:
    """Latency (seconds) and bandwidth (bytes per second) of a link, from half a round trip of 8 bytes and one of
    LARGE_NBYTES: large_s = latency + LARGE_NBYTES / bandwidth. On a busy host the small message may be the slower one;
    then its time is no latency, and half of ``large_s`` stands for it."""
    latency_s = min(small_s, large_s / 2)
    return latency_s, LARGE_NBYTES / (large_s - latency_s)


def best_trip_s(here: World, nbytes: int, most: int) -> float:
    """See World.ping: for up to ``most`` round trips with each rank, fewer where they take long. Collective."""
    trial_s = here.ping(nbytes, TRIALS)
    trips = LINKS_S / max(2 * trial_s * max(1, here.size - 1), 1e-9) if here.is_head else 0
    return here.ping(nbytes, here.agree(max(TRIALS, min(most, int(trips)))))


def validate(args: argparse.Namespace) -> int:
    """Compare the cost model of a hardware with passes on this host."""
    from pipeinfer.bench.validate import compare, table
    from pipeinfer.core.config import BUILTIN, model_directory
    from pipeinfer.costs.hardware import read_hardware

    hardware = read_hardware(args.validate)
    comparisons = compare(hardware, model_directory(args.target or BUILTIN, "target"), args.device)
    if args.json:
        for one in comparisons:
            print(json.dumps(one.row()), flush=True)
        return 0
    print(f"# real passes on this host against {hardware.name}: {hardware.title}; {hardware.cores} threads")
    print("\n".join(table(comparisons)), flush=True)
    return 0
