"""``pipeinfer calibrate``: fit a pair's draft probabilities to observed acceptance, and store the fit."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeinfer.cli.run import add_models, add_sampling, open_engine, read_sampling, refuse_half_a_pair
from pipeinfer.core.errors import refuse
from pipeinfer.core.files import refuse_unwritable

if TYPE_CHECKING:
    from pipeinfer.engine.engine import Engine


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "calibrate",
        help="fit a pair's draft probabilities to observed acceptance",
        description="Decode prompts, fit the probabilities of each draft source to the verified outcomes, and store "
        "the fit for `pipeinfer run --calibration`. Prints the expected calibration error of the claimed "
        "probabilities and of the calibrated ones; each calibrated probability was computed before its outcome.",
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
    parser.add_argument("--out", required=True, metavar="FILE", help="write the fit to FILE (JSON)")


def calibrate(args: argparse.Namespace) -> int:
    """Calibrate as ``args`` say."""
    refuse_half_a_pair(args)
    read_sampling(args)
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
        about = {name: config[name] for name in ("target", "drafts", "dtype", "sampling")}
        write_calibrations(args.out, completion.calibrations, about)
        error = completion.metrics["calibration_error"]
        print(
            f"{len(prompts)} prompts, {error['outcomes']} guesses verified; expected calibration error "
            f"{error['claimed']:.4f} as claimed, {error['believed']:.4f} as believed; stored in {args.out}",
            file=sys.stderr,
        )
    return 0


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
