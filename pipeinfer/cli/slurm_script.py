"""``pipeinfer slurm-script``: write the batch script of a job, and find its mistakes before it queues."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.slurm import DIRECTIVES, LAUNCHERS, batch_script
from pipeinfer.core.errors import refuse

JOBS = ("run", "bench", "calibrate", "doctor")
"""The commands that have something to do on several ranks."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "slurm-script",
        help="write a batch script for Slurm",
        usage="pipeinfer slurm-script COMMAND [option ...] -- ARGUMENT ...",
        description="Write a batch script that runs `pipeinfer COMMAND ARGUMENT ...` with a rank in each task. The "
        "arguments are checked here, so that a mistake in them need not wait in a queue.",
    )
    parser.set_defaults(command=slurm_script)
    parser.add_argument("job", metavar="COMMAND", choices=JOBS, help=f"what the ranks do: {', '.join(JOBS)}")
    # Not `*`, which would be content with the nothing before the options.
    parser.add_argument("arguments", nargs="+", metavar="-- ARGUMENT", help="its arguments; --ranks is not one of them")
    asked = parser.add_argument_group("what is asked of Slurm")
    for name, _, form, default, what in DIRECTIVES:
        told = what if default is None else f"{what} (default {default})"
        asked.add_argument(f"--{name}", metavar=form, default=default, help=told.replace("%", "%%"))
    where = parser.add_argument_group("where it runs")
    where.add_argument(
        "--module", action="append", default=[], metavar="NAME", help="an environment module to load (repeatable)"
    )
    where.add_argument(
        "--venv",
        metavar="DIR",
        default=sys.prefix if sys.prefix != sys.base_prefix else "none",
        help="virtual environment to enter, or none (default: the one this command runs in)",
    )
    where.add_argument("--launcher", choices=sorted(LAUNCHERS), default="srun", help="what starts ranks (default srun)")
    where.add_argument(
        "--mpi", default="pmix", metavar="NAME", help="of srun: how it meets the MPI library (default pmix)"
    )
    parser.add_argument("--out", metavar="FILE", help="write the script to FILE instead of standard output")


def slurm_script(args: argparse.Namespace) -> int:
    """Write the script that ``args`` ask for."""
    from pipeinfer.core.files import write_whole

    refuse_what_no_job_can_be(args.job, args.arguments, args.parse)
    script = batch_script(
        program=["pipeinfer", args.job, *args.arguments],
        directives={directive.name: getattr(args, directive.name.replace("-", "_")) for directive in DIRECTIVES},
        modules=args.module,
        venv=find_venv(args.venv),
        launcher=args.launcher,
        mpi=args.mpi,
    )
    try:
        data = script.encode()
    except UnicodeEncodeError:
        refuse("an argument is not UTF-8 text", "convert it, or put it into a file")
    if args.out:
        write_whole(args.out, script)
        print(f"{args.out} is written; `sbatch {args.out}` submits it", file=sys.stderr)
    else:
        sys.stdout.buffer.write(data)  # in UTF-8, whatever the terminal speaks
    return 0


def refuse_what_no_job_can_be(
    command: str, arguments: list[str], parse: Callable[[Sequence[str]], argparse.Namespace]
) -> None:
    """Leave, or raise UserError, where ``pipeinfer COMMAND ARGUMENTS`` would be refused or cannot be a batch job."""
    job = vars(parse([command, *arguments]))
    if job.get("ranks") is not None:
        refuse("--ranks in a batch job, whose ranks are Slurm's tasks", "use --nodes and --ntasks-per-node, before --")
    if command == "run" and job["prompt"] is None and job["prompt_file"] is None:
        refuse("a batch job has no standard input to read a prompt from", "add --prompt or --prompt-file, after --")


def find_venv(name: str) -> Path | None:
    """The virtual environment called ``name``, with its whole path. Raises UserError where it is none."""
    if name == "none":
        return None
    venv = Path(name).absolute()
    if not (venv / "bin/activate").is_file():
        refuse(f"{venv} is no virtual environment (bin/activate is missing)", "name its folder, or say --venv none")
    return venv
