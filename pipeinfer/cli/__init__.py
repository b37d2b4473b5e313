"""The command line. Nothing heavy is imported before a command is known to make sense."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from launch.environment import launched
from pipeinfer import __version__


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, from one rank."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        say(f"{message}; see `{self.prog} --help`")
        raise SystemExit(2)


def say(message: str) -> None:
    """One line on standard error, from the rank that speaks for all."""
    launch = launched()
    if launch is None or launch.leads:
        print(f"pipeinfer: {message}", file=sys.stderr, flush=True)


def build_parser() -> Parser:
    """The parser of the whole command line."""
    from pipeinfer.cli import bench, calibrate, doctor, plot, replay, run, slurm_script

    parser = Parser(
        prog="pipeinfer", description="Decode large language models over MPI with asynchronous speculation."
    )
    parser.add_argument("--version", action="version", version=f"pipeinfer {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run.add_parser(commands)
    calibrate.add_parser(commands)
    replay.add_parser(commands)
    bench.add_parser(commands)
    doctor.add_parser(commands)
    plot.add_parser(commands)
    slurm_script.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` says; returns the exit code."""
    from pipeinfer.errors import PipeinferError

    args = build_parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return int(args.command(args))
    except PipeinferError as error:
        if str(error):
            say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has left; there is nobody to tell
        return 141
