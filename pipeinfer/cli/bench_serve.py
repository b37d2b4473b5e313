"""``pipeinfer bench serve``: put load on a server of OpenAI's interface, ours or another, and measure its answers."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeinfer.cli.serve import KEY
from pipeinfer.core.errors import refuse

if TYPE_CHECKING:
    from pipeinfer.bench.serve_client import Client, Outcome
    from pipeinfer.bench.serve_load import Load
    from pipeinfer.bench.serve_measures import Objectives

NAME = "bench serve"
"""One word to argparse: the suites of `pipeinfer bench` leave no room for a further command (see commands_of)."""
SPARE_FILES = 64
"""Open files beside a connection for each client."""


def commands_of(argv: list[str]) -> list[str]:
    """``argv`` with `bench serve` as one word."""
    return [NAME, *argv[2:]] if argv[:2] == NAME.split() else argv


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        NAME,
        prog="pipeinfer bench serve",
        help="measure a server under load",
        description="Send streaming requests to a server of OpenAI's interface (this one's, llama-server, vLLM) and "
        "measure TTFT, TPOT, ITL and throughput. One request that is not measured comes first. The exit code is 1 if "
        "no request was answered or --repeat-check found a difference.",
    )
    parser.set_defaults(command=bench_serve)
    server = parser.add_argument_group("server")
    server.add_argument("--url", required=True, metavar="U", help="http://HOST:PORT, with or without /v1")
    server.add_argument("--model", metavar="M", help="the model's id (default: the first that the server lists)")
    server.add_argument("--api-key", metavar="KEY", help=f"the key that the server wants (default: ${KEY})")
    server.add_argument("--chat", action="store_true", help="use /v1/chat/completions instead of /v1/completions")
    server.add_argument("--timeout", type=float, default=120.0, metavar="S", help="longest silence (default 120 s)")
    add_load(parser.add_argument_group("load"))
    told = parser.add_argument_group("results")
    told.add_argument("--ttft-ms", type=float, metavar="T", help="objective for goodput: most ms to the first token")
    told.add_argument("--tpot-ms", type=float, metavar="T", help="objective for goodput: most ms per further token")
    told.add_argument(
        "--repeat-check", action="store_true", help="compare the texts of equal requests and report differences"
    )
    told.add_argument("--json", action="store_true", help="print one JSON object per row instead of a table")
    told.add_argument("--out", metavar="DIR", help="also write the rows to DIR/serve.jsonl")


def add_load(load: Any) -> None:
    """Add the options that say what is sent to the group ``load``."""
    load.add_argument(
        "--concurrency",
        type=numbers,
        metavar="N,...",
        help="requests at a time; a row for each N (default 1; with --rate as many as come)",
    )
    load.add_argument("--requests", type=int, default=64, metavar="N", help="requests of a row (default 64)")
    load.add_argument(
        "--prompts", default="builtin", metavar="FILE", help="prompts, one a line (default: those of our benchmarks)"
    )
    load.add_argument(
        "--distinct", type=int, metavar="N", help="different requests, which come in turn (default: one per prompt)"
    )
    load.add_argument("--max-tokens", type=int, default=128, metavar="T", help="new tokens (default 128)")
    load.add_argument("--ignore-eos", action="store_true", help="ask for exactly so many (not all servers can)")
    load.add_argument("--temperature", type=float, metavar="T", help="sample, with a seed for each distinct request")
    load.add_argument("--rate", type=float, default=0.0, metavar="R", help="requests per second (a Poisson process)")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of times, aborts and sampling (default 0)")
    load.add_argument(
        "--abort-share", type=float, default=0.0, metavar="P", help="share of requests given up at random moments"
    )


def numbers(text: str) -> list[int]:
    """Whole numbers separated by commas; argparse's error message contains this function's name."""
    return [int(number) for number in text.split(",")]


def bench_serve(args: argparse.Namespace) -> int:
    """Measure as ``args`` say."""
    refuse_numbers(args)
    from pipeinfer.bench.serve_client import Client
    from pipeinfer.bench.serve_http import Address
    from pipeinfer.bench.serve_load import Load, read_prompts
    from pipeinfer.bench.serve_measures import Objectives
    from pipeinfer.core.files import refuse_unwritable

    address, prompts = Address.read(args.url), read_prompts(args.prompts)
    levels = args.concurrency or [args.requests if args.rate else 1]
    allow_files(max(min(level, args.requests) for level in levels))
    if args.out is not None:
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse(f"{args.out} cannot be made ({error.strerror})", "name another directory with --out")
        refuse_unwritable(Path(args.out) / "serve.jsonl")
    key = os.environ.get(KEY) or None if args.api_key is None else args.api_key
    if key is not None and not (key.isascii() and key.isprintable()):
        refuse("the API key is not printable ASCII text", f"correct --api-key or {KEY}")
    load = Load(
        prompts=prompts,
        requests=args.requests,
        concurrency=levels[0],
        max_tokens=args.max_tokens,
        distinct=args.distinct or min(len(prompts), args.requests),
        rate=args.rate,
        seed=args.seed,
        abort_share=args.abort_share,
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        is_chat=args.chat,
        model=args.model or "",
    )
    client, objectives = Client(address, key, args.chat, args.timeout), Objectives(args.ttft_ms, args.tpot_ms)
    rows = asyncio.run(measure_all(args, client, load, levels, objectives))
    is_failed = any(not row["completed"] or (row["repeats"] or {}).get("differences") for row in rows)
    return 1 if is_failed else 0


def refuse_numbers(args: argparse.Namespace) -> None:
    """Raise UserError for numbers that mean nothing."""
    least = {"requests": 1, "max_tokens": 1, "distinct": 1}
    for name, low in least.items():
        if (value := getattr(args, name)) is not None and value < low:
            refuse(f"--{name.replace('_', '-')} {value}", f"use at least {low}")
    for level in args.concurrency or ():
        if level < 1:
            refuse(f"--concurrency {level}", "use at least 1")
    for name in ("rate", "timeout", "ttft_ms", "tpot_ms", "temperature"):
        if (value := getattr(args, name)) is not None and not 0 <= value < math.inf:
            refuse(f"--{name.replace('_', '-')} {value:g}", "use a number that is not negative")
    if not args.timeout:
        refuse("--timeout 0", "use seconds")
    if not 0 <= args.abort_share <= 1:
        refuse(f"--abort-share {args.abort_share:g}", "use a share from 0 to 1")


def allow_files(clients: int) -> None:
    """Raise the process's limit of open files for so many connections, where it is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = clients + SPARE_FILES
    if hard != resource.RLIM_INFINITY and wanted > hard:
        refuse(f"{clients} connections with at most {hard} open files", "lower --concurrency, or raise ulimit -n")
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


async def measure_all(
    args: argparse.Namespace, client: Client, load: Load, levels: list[int], objectives: Objectives
) -> list[dict[str, Any]]:
    """A row for each of ``levels``, printed and written as soon as it is there."""
    from pipeinfer.bench.serve_http import HttpError
    from pipeinfer.bench.serve_load import prepare
    from pipeinfer.bench.serve_measures import heading, line
    from pipeinfer.core.files import write_whole

    def say(text: str) -> None:
        if not args.json:
            print(text, flush=True)

    if not load.model:
        try:
            load = replace(load, model=next(iter(await client.models()), ""))
        except HttpError as error:
            refuse(f"{args.url} does not list its models ({error})", "see --url and --api-key, or name --model")
    load = await prepare(load, client)
    say(f"# {args.url}, model {load.model}; {load.requests} requests a row, {load.distinct} of them distinct; ms")
    say(heading())
    rows: list[dict[str, Any]] = []
    for level in levels:
        row = await measure_one(args, client, replace(load, concurrency=level), objectives)
        rows.append(row)
        print(json.dumps(row) if args.json else line(row), flush=True)
        remarks(row, say)
        if args.out is not None:
            write_whole(Path(args.out) / "serve.jsonl", "".join(json.dumps(one) + "\n" for one in rows))
    client.close()
    return rows


async def measure_one(args: argparse.Namespace, client: Client, load: Load, objectives: Objectives) -> dict[str, Any]:
    """The row of ``load``."""
    from pipeinfer.bench.serve_load import apply
    from pipeinfer.bench.serve_measures import measure
    from pipeinfer.bench.serve_repeats import Repeats
    from pipeinfer.cli.progress import ProgressBar

    outcomes: list[Outcome] = []
    repeats, errors = Repeats(), [0]
    with ProgressBar(load.requests) as bar:

        def on_done(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if args.repeat_check and not outcome.error:
                repeats.check(outcome.key, outcome.text, outcome.is_whole)
            outcome.text = ""
            errors[0] += bool(outcome.error)
            bar.tell(len(outcomes), f"{len(outcomes)} of {load.requests} requests, {errors[0]} errors")

        times = await apply(load, client, on_done)
    told = {"compared": repeats.compared, "differences": repeats.differences, "examples": repeats.examples}
    row = {"url": args.url, **measure(load, outcomes, times, objectives)}
    return row | {"repeats": told if args.repeat_check else None}


def remarks(row: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say what the table does not."""
    for reason, count in row["reasons"].items():
        say(f"# {count} errors: {reason}")
    if row["tokens_by"] == "chunks":
        say("# the server does not tell usage: tokens are counted by chunks with text, which may hold several")
    if row["repeats"] is not None:
        say(f"# {row['repeats']['compared']} repeated texts compared, {row['repeats']['differences']} differ")
        for example in row["repeats"]["examples"]:
            say(f"# {example}")
