"""`pipeinfer serve` beside llama.cpp's server: the same weights, threads, client and requests, one server at a time.

    python -m benchmarks.serve_beside_llama                          the built-in pair in bf16, at 1, 4 and 16 clients
    python -m benchmarks.serve_beside_llama --dtype fp32             the same in fp32
    python -m benchmarks.serve_beside_llama --pair DIR --tokens 64   a pair of `python -m pipeinfer.bench.shaped_pair`

Each round starts every server anew for each number of clients, warms it up, and measures it; the order turns from round
to round. Ours has one rank and two ranks that share the threads. llama.cpp's has as many slots as there are clients,
and decodes with and without the draft; the better one counts. All is greedy, and every answer has the same number of
tokens. Needs pipeinfer[peers,serve]. xllamacpp's llama.cpp is for any processor with AVX2; --llama-server names a
program that was built for this one. The exit code is 1 where texts of ours differ, prompts are other tokens to
another server, or a server failed, which is then left out.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving.client import Sample, load_of, measure
from benchmarks.serving.models import FORMS, Pair, prepare
from benchmarks.serving.servers import Contender, contenders, refuse_missing, running
from benchmarks.serving.table import Found, heading, line, remarks, rows
from launch.cores import usable_cores
from pipeinfer.bench.fingerprint import fingerprint, version
from pipeinfer.bench.serve_load import Load, read_prompts
from pipeinfer.cli.bench_serve import numbers
from pipeinfer.core.errors import PipeinferError, refuse

LEAST_REQUESTS, REQUESTS_EACH = 8, 3


def main() -> int:
    """Compare as the command line says."""
    args = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the server that runs is ended, too
    try:
        refuse_numbers(args)
        refuse_missing(args.llama_server)
        with tempfile.TemporaryDirectory(prefix="pipeinfer-beside-") as place:
            pair = prepare(args.pair, args.dtype, args.gguf, args.context, Path(place))
            return compare(args, pair)
    except PipeinferError as error:
        print(f"benchmarks.serve_beside_llama: {error}", file=sys.stderr)
        return error.exit_code


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--pair", default="builtin", metavar="DIR", help="a folder with target and draft (default builtin)"
    )
    made.add_argument("--dtype", default="bf16", choices=FORMS, help="of ours (default bf16)")
    made.add_argument(
        "--gguf", default="", choices=("fp32", "fp16", "bf16"), help="of llama.cpp's (default: fp16 for bf16)"
    )
    made.add_argument("--clients", type=numbers, default=[1, 4, 16], metavar="N,...", help="(default 1,4,16)")
    made.add_argument("--requests", type=int, default=0, metavar="N", help="of a row (default: 3 a client, at least 8)")
    made.add_argument("--tokens", type=int, default=128, metavar="T", help="new tokens of a request (default 128)")
    made.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds (default 3)")
    made.add_argument("--threads", type=int, default=0, metavar="N", help="of a server (default: all usable cores)")
    made.add_argument("--llama-threads", type=int, default=0, metavar="N", help="of llama.cpp's (default: --threads)")
    made.add_argument("--ranks", type=numbers, default=[1, 2], metavar="N,...", help="of ours (default 1,2)")
    made.add_argument(
        "--n-max", type=numbers, default=[4, 8, 16], metavar="N,...", help="llama.cpp's drafts (default 4,8,16)"
    )
    made.add_argument("--context", type=int, default=0, metavar="N", help="tokens of a request (default: the models')")
    made.add_argument("--prompts", default="builtin", metavar="FILE", help="as of `pipeinfer bench serve`")
    made.add_argument("--llama-server", default="", metavar="FILE", help="llama.cpp's program (default: xllamacpp's)")
    made.add_argument("--timeout", type=float, default=600.0, metavar="S", help="longest silence (default 600 s)")
    made.add_argument("--json", action="store_true", help="JSON, one object a line")
    return made


def refuse_numbers(args: argparse.Namespace) -> None:
    """Raise UserError for numbers that mean nothing."""
    least = {
        "requests": 0,
        "tokens": 2,
        "repeats": 1,
        "threads": 0,
        "llama_threads": 0,
        "clients": 1,
        "ranks": 1,
        "n_max": 1,
    }
    for name, low in least.items():
        given = getattr(args, name)
        if min(given if isinstance(given, list) else [given], default=low) < low:
            refuse(f"--{name.replace('_', '-')} below {low}", f"use at least {low}")
    args.threads = args.threads or usable_cores()
    args.llama_threads = args.llama_threads or args.threads


def compare(args: argparse.Namespace, pair: Pair) -> int:
    """Measure all rounds and print the rows; 1 if one failed or there are remarks."""
    prompts = read_prompts(args.prompts)
    loads = {
        clients: load_of(prompts, args.requests or max(LEAST_REQUESTS, REQUESTS_EACH * clients), clients, args.tokens)
        for clients in args.clients
    }
    samples: dict[tuple[int, Contender], list[Sample]] = {}
    failed: set[tuple[int, Contender]] = set()
    for clients, contender, found in measured(args, pair, loads):
        if isinstance(found, Sample):
            samples.setdefault((clients, contender), []).append(found)
        else:
            failed.add((clients, contender))
        told = f"{found.tokens_per_s:.1f} tokens/s" if isinstance(found, Sample) else f"left out: {found}"
        print(f"# {clients} clients, {contender.name}: {told}", file=sys.stderr, flush=True)
    is_right = report(args, pair, {key: taken for key, taken in samples.items() if key not in failed})
    return int(not is_right or bool(failed))


def report(args: argparse.Namespace, pair: Pair, samples: dict[tuple[int, Contender], list[Sample]]) -> bool:
    """Print the rows; whether there is nothing to remark."""
    if not args.json:
        print(about(args, pair) + "\n" + heading())
    shared = {"suite": "serve-beside-llama", **facts(args, pair)}
    is_right = True
    for clients in args.clients:
        found = [Found(one, taken) for (level, one), taken in samples.items() if level == clients]
        for row in rows(clients, found):
            print(json.dumps(shared | row) if args.json else line(row))
        for remark in remarks(found):
            is_right = False
            print(f"# {clients} clients: {remark}", file=sys.stderr)
    return is_right


def measured(
    args: argparse.Namespace, pair: Pair, loads: dict[int, Load]
) -> Iterator[tuple[int, Contender, Sample | PipeinferError]]:
    """A sample of each contender at each number of clients, in each round; or why there is none."""
    every = contenders(args.ranks, args.n_max)
    for turn in range(args.repeats):
        for clients, load in loads.items():
            for contender in every if turn % 2 == 0 else every[::-1]:
                threads = args.threads if contender.is_ours else args.llama_threads
                found: Sample | PipeinferError
                try:
                    with running(contender, pair, clients, threads, args.llama_server) as url:
                        found = measure(url, load, args.timeout)
                except PipeinferError as error:
                    found = error
                yield clients, contender, found


def facts(args: argparse.Namespace, pair: Pair) -> dict[str, Any]:
    """What all rows share."""
    return {
        "pair": pair.name, "dtype": pair.dtype, "gguf": pair.form, "context": pair.context, "tokens": args.tokens,
        "threads": args.threads, "llama_threads": args.llama_threads,
        "llama.cpp": args.llama_server or f"xllamacpp {version('xllamacpp')}", "fingerprint": fingerprint({}, ""),
    }  # fmt: skip


def about(args: argparse.Namespace, pair: Pair) -> str:
    """The line over the heading."""
    told = facts(args, pair)
    return (
        f"# {told['pair']}: ours in {told['dtype']} on {args.threads} threads, {told['llama.cpp']} in {told['gguf']} "
        f"on {args.llama_threads}; {args.tokens} tokens, {args.repeats} rounds; ms; x: times llama.cpp's best (*)"
    )


if __name__ == "__main__":
    sys.exit(main())
