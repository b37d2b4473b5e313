"""The command line. A command's arguments are checked before torch or MPI is imported."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from typing import NoReturn

from launch.failure import leave, write
from launch.signals import end_in_order
from pipeinfer.cli.streams import OutputError, drop_output, insist_on_utf8, put_in_place, say
from pipeinfer.core.errors import exit_code
from pipeinfer.core.version import __version__


class Parser(argparse.ArgumentParser):
    """Prints an error in one line, on one rank."""

    def error(self, message: str) -> NoReturn:
        """Leave with exit code 2."""
        say(f"{message}; see `{self.prog} --help`")
        raise SystemExit(2)


def build_parser() -> Parser:
    """The parser of the whole command line."""
    from pipeinfer.cli import (
        batch,
        bench,
        bench_serve,
        calibrate,
        chat,
        doctor,
        plot,
        quantize,
        replay,
        run,
        serve,
        slurm_script,
    )

    parser = Parser(
        prog="pipeinfer", description="Decode large language models over MPI with asynchronous speculation."
    )
    parser.add_argument("--version", action="version", version=f"pipeinfer {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run.add_parser(commands)
    chat.add_parser(commands)
    serve.add_parser(commands)
    batch.add_parser(commands)
    calibrate.add_parser(commands)
    quantize.add_parser(commands)
    replay.add_parser(commands)
    bench.add_parser(commands)
    bench_serve.add_parser(commands)
    doctor.add_parser(commands)
    plot.add_parser(commands)
    slurm_script.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` and return the exit code. Without ``argv`` this function also sets up the process:
    its arguments, standard streams and signal handlers. Every exit passes through here."""
    try:
        if argv is None:
            put_in_place()
            insist_on_utf8()
            end_in_order()
        code = _command(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
        if argv is None:
            gc.freeze()  # or Python looks through all of torch for garbage before it ends
        return code
    except BaseException as error:
        return _end(error)


def _command(argv: list[str]) -> int:
    from pipeinfer.cli.bench_serve import commands_of

    parser = build_parser()
    args = parser.parse_args(commands_of(argv))
    args.argv, args.parse = argv, parser.parse_args
    return int(args.command(args))


def _end(error: BaseException) -> int:
    """Report ``error`` and return the exit code."""
    try:
        sys.stdout.flush()
    except OutputError as lost:
        drop_output()
        if isinstance(error, SystemExit) and exit_code(error) == 0:
            error = lost  # the help text was not written
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            write(error.code)
        return exit_code(error)
    return leave(error)
