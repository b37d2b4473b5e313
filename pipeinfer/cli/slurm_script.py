"""``pipeinfer slurm-script``: write the batch script of a job, and check its arguments before it queues."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.slurm import DIRECTIVES, LAUNCHERS, batch_script
from pipeinfer.core.errors import refuse

JOBS = ("run", "serve", "batch", "bench", "calibrate", "doctor")
"""The commands that run on several ranks."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "slurm-script",
        help="write a batch script for Slurm",
        usage="pipeinfer slurm-script COMMAND [option ...] -- ARGUMENT ...",
        description="Write a batch script that runs `pipeinfer COMMAND ARGUMENT ...` with one rank per task. The "
        "arguments are checked now, before the job queues.",
    )
    parser.set_defaults(command=slurm_script)
    parser.add_argument("job", metavar="COMMAND", choices=JOBS, help=f"the command: {', '.join(JOBS)}")
    # Not `*`, which would match the empty list before the options.
    parser.add_argument("arguments", nargs="+", metavar="-- ARGUMENT", help="the command's arguments, without --ranks")
    asked = parser.add_argument_group("options of sbatch")
    for name, _, form, default, what in DIRECTIVES:
        told = what if default is None else f"{what} (default {default})"
        asked.add_argument(f"--{name}", metavar=form, default=default, help=told.replace("%", "%%"))
    where = parser.add_argument_group("environment")
    where.add_argument(
        "--module", action="append", default=[], metavar="NAME", help="an environment module to load (repeatable)"
    )
    where.add_argument(
        "--venv",
        metavar="DIR",
        default=sys.prefix if sys.prefix != sys.base_prefix else "none",
        help="virtual environment to activate, or none (default: the environment of this command)",
    )
    where.add_argument(
        "--launcher", choices=sorted(LAUNCHERS), default="srun", help="the command that starts ranks (default srun)"
    )
    where.add_argument("--mpi", default="pmix", metavar="NAME", help="PMI type for srun --mpi (default pmix)")
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
        sys.stdout.buffer.write(data)  # in UTF-8 in every locale
    return 0


def refuse_what_no_job_can_be(
    command: str, arguments: list[str], parse: Callable[[Sequence[str]], argparse.Namespace]
) -> None:
    """Exit, or raise UserError, if ``pipeinfer COMMAND ARGUMENTS`` would be refused or cannot be a batch job."""
    job = vars(parse([command, *arguments]))
    if job.get("ranks") is not None:
        refuse("--ranks in a batch job, whose ranks are Slurm's tasks", "use --nodes and --ntasks-per-node, before --")
    if command == "run" and job["prompt"] is None and job["prompt_file"] is None:
        refuse("a batch job has no standard input to read a prompt from", "add --prompt or --prompt-file, after --")


def find_venv(name: str) -> Path | None:
    """The virtual environment ``name`` with its full path. Raises UserError if there is none."""
    if name == "none":
        return None
    venv = Path(name).absolute()
    if not (venv / "bin/activate").is_file():
        refuse(f"{venv} is no virtual environment (bin/activate is missing)", "name its folder, or say --venv none")
    return venv
