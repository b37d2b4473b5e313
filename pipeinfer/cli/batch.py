"""``pipeinfer batch``: decode a file of requests."""

from __future__ import annotations

import argparse
import os
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, BinaryIO

from pipeinfer.cli.run import (
    Progress,
    add_execution,
    add_models,
    add_requests,
    note,
    open_engine,
    refuse_half_a_pair,
    refuse_no_timeout,
)
from pipeinfer.cli.serve import model_id
from pipeinfer.core.errors import Terminated, exit_code, refuse

if TYPE_CHECKING:
    from pipeinfer.cli.batch_job import Counts
    from pipeinfer.cli.batch_output import BatchOutput
    from pipeinfer.engine.engine import Engine

MAX_NUM_SEQS = 8
"""Requests that are decoded at once, unless --max-num-seqs says how many."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "batch",
        help="decode a file of requests",
        description="Decode the requests in IN, one JSON object a line as in OpenAI's batch files, and append the "
        "answers to OUT. Requests that OUT has answers to are skipped, so the same command goes on where it was "
        "stopped. Under mpirun or srun the job's ranks are used; otherwise --ranks N starts N ranks on this machine.",
    )
    parser.set_defaults(command=batch)
    files = parser.add_argument_group("requests and answers")
    files.add_argument(
        "input", metavar="IN", help='lines {"custom_id": ..., "url": ..., "body": {...}}, or {"prompt": ...}'
    )
    files.add_argument("--out", required=True, metavar="OUT", help="the file of answers, in the order of their ends")
    files.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="requests with the engine at a time, waiting ones included (default: twice --max-num-seqs)",
    )
    files.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="the model's id in requests (default: the name of the target's directory); `default` always works, too",
    )
    add_models(parser.add_argument_group("models"))
    how = parser.add_argument_group("execution")
    add_execution(how)
    add_requests(how, MAX_NUM_SEQS)


def batch(args: argparse.Namespace) -> int:
    """Decode as ``args`` say."""
    refuse_half_a_pair(args)
    refuse_no_timeout(args)
    concurrency = 2 * args.max_num_seqs if args.concurrency is None else args.concurrency
    if args.concurrency is not None and concurrency < 1:
        refuse(f"--concurrency {concurrency}", "use at least 1")
    from launch.collector import frozen

    name = model_id(args)
    signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGTERM))
    with ExitStack() as held:
        files: list[tuple[BinaryIO, BatchOutput]] = []

        def check(engine: Engine) -> None:  # on the head, before anything is loaded
            files.append(open_files(args.input, args.out, held))

        with Progress("loading the models"):
            opened = open_engine(args, check, policy=args.policy, timeout_s=args.timeout, trace=args.trace)
        if not opened.is_head:
            # srun signals all ranks; the head lets them go once what runs was cancelled.
            for signum in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(signum, signal.SIG_IGN)
        with frozen(), opened as engine:
            if engine is None:
                return 0  # this rank has served
            ended_by = decode(engine, *files[0], name, concurrency)
    return exit_code(Terminated(ended_by)) if ended_by else 0


def open_files(source: str, out: str, held: ExitStack) -> tuple[BinaryIO, BatchOutput]:
    """The input and the output, both open until ``held`` is left. Raises UserError where one cannot be."""
    from pipeinfer.cli.batch_output import BatchOutput

    try:
        file = held.enter_context(open(source, "rb"))  # noqa: SIM115  closed by held
    except OSError as error:
        refuse(f"{source} cannot be read ({error.strerror})", "name a readable file")
    if os.path.exists(out) and os.path.samefile(source, out):
        refuse(f"--out {out} is the input", "name another file")
    return file, held.enter_context(BatchOutput(out))


def decode(engine: Engine, file: BinaryIO, output: BatchOutput, model: str, concurrency: int) -> int:
    """Decode the lines of ``file``; the signal that has ended it early, or 0."""
    from pipeinfer.cli.batch_job import BatchJob
    from pipeinfer.cli.batch_lines import read_lines
    from pipeinfer.cli.progress import ProgressBar

    with ProgressBar(os.fstat(file.fileno()).st_size) as bar:

        def tell(counts: Counts) -> None:
            bar.tell(counts.nbytes, of_lines(counts) + f", {counts.tokens / max(bar.elapsed_s, 1e-9):.1f} tokens/s")

        job = BatchJob(engine, read_lines(file), output, model, concurrency, tell)
        job.run()
    said = f"pipeinfer: {output.path}: {in_words(job.counts, bar.elapsed_s)}"
    if job.signum:
        said += f"; ended by {signal.Signals(job.signum).name}, the same command goes on from here"
    note(said)
    return job.signum


def in_words(counts: Counts, elapsed_s: float) -> str:
    """What became of the lines, and the speed."""
    speed = counts.tokens / max(elapsed_s, 1e-9)
    return f"{of_lines(counts)}; {counts.prompt_tokens} prompt tokens, {counts.tokens} new, {speed:.1f} tokens/s"


def of_lines(counts: Counts) -> str:
    """What became of the lines."""
    return f"{counts.answered} answered, {counts.errors} refused, {counts.skipped} skipped"
