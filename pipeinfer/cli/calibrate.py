"""``pipeinfer calibrate``: fit a pair's draft probabilities to observed acceptance, and store the fit; or find the best
of several drafts."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.environment import launched
from pipeinfer.cli.run import add_models, add_sampling, open_engine, read_sampling, refuse_half_a_pair
from pipeinfer.core.config import NONE
from pipeinfer.core.errors import refuse
from pipeinfer.core.files import refuse_unwritable
from pipeinfer.core.self_draft import split_names

if TYPE_CHECKING:
    from pipeinfer.engine.engine import Engine


ABOUT = ("target", "drafts", "dtype", "sampling")
"""What a file of fits says of the job that they come from."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "calibrate",
        help="fit a pair's draft probabilities to observed acceptance",
        description="Decode prompts, fit the probabilities of each draft source to the verified outcomes, and store "
        "the fit for `pipeinfer run --calibration`. Prints the expected calibration error of the claimed "
        "probabilities and of the calibrated ones; each calibrated probability was computed before its outcome. With "
        "--drafts: decode the prompts with each of these drafts, and say which one is fastest.",
    )
    parser.set_defaults(command=calibrate)
    add_models(parser.add_argument_group("models"))
    what = parser.add_argument_group("data")
    what.add_argument(
        "--prompts", required=True, metavar="FILE", help='one prompt per line, bare or as {"prompt": "..."}'
    )
    what.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="K", help="new tokens per prompt (default 128)"
    )
    add_sampling(parser.add_argument_group("sampling"))
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine (1 needs no MPI)")
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", help="change a knob of continuous")
    parser.add_argument("--calibration", metavar="FILE", help="start from the fit in FILE")
    parser.add_argument("--out", metavar="FILE", help="write the fit to FILE (JSON); with --drafts the best one's")
    parser.add_argument(
        "--drafts",
        type=split_names,
        metavar="A,B,...",
        help="rank drafts by tokens per second: directories, none, or self:int4, self:layers=8, ... (see --draft)",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="R", help="with --drafts: rounds of all drafts (default 3)"
    )


def calibrate(args: argparse.Namespace) -> int:
    """Calibrate as ``args`` say."""
    refuse_half_a_pair(args)
    read_sampling(args)
    if args.drafts:
        return rank_drafts(args)
    if args.out is None:
        refuse("calibrate without --out", "name the file for the fit, or the --drafts to be ranked")
    prompts = read_prompts(args.prompts)
    from launch.collector import frozen
    from speculation.trees.calibration_file import write_calibrations

    def check(engine: Engine) -> None:
        refuse_unwritable(args.out)  # on the head, which writes it
        for prompt in prompts:
            engine.tokenize(prompt, args.max_new_tokens)

    with frozen(), open_engine(args, check, policy="continuous") as engine:
        if engine is None:
            return 0  # this rank has served
        sampling = read_sampling(args, engine.sampling)
        for prompt in prompts:
            completion = engine.generate(prompt, args.max_new_tokens, sampling=sampling)
        config = completion.config
        write_calibrations(args.out, completion.calibrations, {name: config[name] for name in ABOUT})
        error = completion.metrics["calibration_error"]
        print(
            f"{len(prompts)} prompts, {error['outcomes']} guesses verified; expected calibration error "
            f"{error['claimed']:.4f} as claimed, {error['believed']:.4f} as believed; stored in {args.out}",
            file=sys.stderr,
        )
    return 0


def rank_drafts(args: argparse.Namespace) -> int:
    """Measure the drafts that ``args`` name, and print them, the best one first."""
    from launch.collector import frozen
    from pipeinfer.bench.drafts import measure_drafts, table
    from speculation.trees.calibration_file import write_calibrations

    names, prompts = list(dict.fromkeys(args.drafts)), read_prompts(args.prompts)
    if args.draft:
        refuse("--drafts with --draft", "name all candidates with --drafts")
    if args.repeats < 1:
        refuse(f"--repeats {args.repeats}", "measure at least once")

    def check(engine: Engine) -> None:
        if args.out is not None:
            refuse_unwritable(args.out)
        for prompt in prompts:
            engine.tokenize(prompt, args.max_new_tokens)

    def opened(name: str, check: Callable[[Engine], None] = check) -> Engine:
        asked = vars(args) | {"draft": [name], "drafters": None if name == NONE else args.drafters}
        return open_engine(argparse.Namespace(**asked), check, policy="continuous")

    if launched() is None:  # else each is refused when its turn comes, on all ranks alike
        for name in names:
            with contextlib.suppress(_Possible):
                opened(name, _stop)
    with frozen():
        found = measure_drafts(
            names,
            opened,
            prompts,
            args.max_new_tokens,
            args.repeats,
            lambda engine: read_sampling(args, engine.sampling),
            lambda done: print(done, file=sys.stderr, flush=True),
        )
    if found:
        best = found[0]
        print("\n".join(table(found)))
        print(f"use --draft {best.name}: {best.speed:.1f} tokens/s, the median of {len(best.speeds)} answers")
        if args.out is not None:
            write_calibrations(args.out, best.calibrations, {name: best.config[name] for name in ABOUT})
    return 0


class _Possible(Exception):
    """A job may start; it is not to."""


def _stop(engine: Engine) -> None:
    raise _Possible


def read_prompts(path: str) -> list[str]:
    """The prompts in the file at ``path``, one a line. Raises UserError where there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["prompt"] if line.startswith("{") else line for line in lines if line.strip()]
    except OSError as error:
        refuse(f"{path} cannot be read ({error.strerror})", "name a readable file")
    except (ValueError, KeyError, TypeError) as error:
        refuse(f"{path} is no file of prompts ({error!r})", 'write one a line, bare or as {"prompt": "..."}')
    if not prompts:
        refuse(f"{path} holds no prompt", "write one a line")
    return prompts
