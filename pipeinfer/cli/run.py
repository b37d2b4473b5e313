"""``pipeinfer run``: decode one prompt and show the metrics."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.environment import OPEN_MPI, launched
from pipeinfer.core.errors import PipeinferError, refuse
from pipeinfer.core.self_draft import is_self_draft

if TYPE_CHECKING:
    from pipeinfer.core.ports import Sampling
    from pipeinfer.engine.answer import Completion
    from pipeinfer.engine.engine import Engine
    from pipeinfer.engine.prompt import Prompt


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "run",
        help="decode one prompt",
        description="Decode one prompt. Text goes to standard output, everything else to standard error. Under mpirun "
        "or srun the job's ranks are used; otherwise --ranks N starts N ranks on this machine.",
    )
    parser.set_defaults(command=run)
    add_models(parser.add_argument_group("models"))
    what = parser.add_argument_group("prompt and answer")
    prompt = what.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt (default: read standard input)")
    prompt.add_argument("--prompt-file", metavar="F", help="read the prompt from a file")
    prompt.add_argument("--prompt-tokens", type=token_list, metavar="N,N,...", help="the prompt as token ids")
    what.add_argument("--chat", action="store_true", help="apply the tokenizer's chat template to the prompt")
    what.add_argument("--max-new-tokens", type=int, default=128, metavar="K", help="stop after K tokens (default 128)")
    what.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the text before the first TEXT (repeatable)"
    )
    what.add_argument("--ignore-eos", action="store_true", help="continue after an end-of-text token")
    add_sampling(parser.add_argument_group("sampling"))
    how = parser.add_argument_group("execution")
    add_execution(how)
    how.add_argument(
        "--forced-acceptance",
        type=probabilities,
        default=(),
        metavar="P[,P...]",
        help="the models compute as usual, but the draft's first choice is right with probability P, its second with "
        "the next P, ...; the tokens have no meaning and are shown as numbers",
    )
    how.add_argument(
        "--random-weights",
        action="store_true",
        help="with --forced-acceptance: the models' directories need only a config.json",
    )
    how.add_argument("--verify", action="store_true", help="also decode plainly in one process, and compare the tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text and table")
    parser.add_argument("--logprobs", action="store_true", help="with --json: add the tokens' log-probabilities")


def add_execution(group: Any) -> None:
    """Add the options that say how a job is executed to the parser's ``group``."""
    group.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine (1 needs no MPI)")
    group.add_argument(
        "--policy",
        metavar="NAME|FILE",
        help="plain, continuous or a TOML file with a policy's knobs (default: continuous; plain on one rank without a "
        "draft)",
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="KNOB=VALUE", help="change one knob of the policy (repeatable)"
    )
    group.add_argument("--calibration", metavar="FILE", help="start from a fit of `pipeinfer calibrate`")
    group.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="stop after S seconds without progress (0: never)"
    )
    group.add_argument(
        "--trace", metavar="FILE", help="write each rank's events to FILE.rank0, ... (see `pipeinfer replay`)"
    )


def add_models(group: Any) -> None:
    """Add the options that name the models to the parser's ``group``."""
    group.add_argument("--target", metavar="MODEL", help="directory or GGUF file (default: the built-in pair)")
    group.add_argument(
        "--draft",
        action="append",
        metavar="MODEL",
        help="draft model with the target's tokenizer (repeat for further ones), none, or one made of the target: "
        "self:int4, self:layers=8, self:int4,layers=8",
    )
    group.add_argument("--tokenizer", metavar="DIR", help="directory with the tokenizer (default: the target's own)")
    group.add_argument("--drafters", type=int, metavar="N", help="number of drafters (default: one per --draft)")
    group.add_argument(
        "--dtype",
        default="auto",
        metavar="auto|fp32|bf16|fp16",
        help="type of weights and KV slots (default: what each checkpoint says; fp32 without the kernel library)",
    )
    add_computing(group)
    group.add_argument("--context", type=int, default=0, metavar="N", help="maximum number of tokens, prompt included")


def add_computing(group: Any) -> None:
    """Add the options that say how ranks compute to the parser's ``group``."""
    group.add_argument(
        "--numerics", default="portable", metavar="portable|fast", help="fast: this processor's own 16-bit products"
    )
    group.add_argument(
        "--activations", default="fp32", metavar="fp32|int8", help="int8: products of quantised weights with bytes"
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="threads of each rank (default: its share of the cores it may use)"
    )
    group.add_argument(
        "--weights-memory", default="0", metavar="SIZE", help="memory of each rank for the target's weights, such as 8G"
    )
    group.add_argument("--tp", type=int, default=1, metavar="N", help="ranks that share each stage (default 1)")
    group.add_argument("--stages", type=int, metavar="S", help="refuse any other number of stages")
    group.add_argument(
        "--fused",
        default="auto",
        metavar="auto|on|off",
        help="exchanges of --tp ranks: fused with the kernels, or bulk collectives (default: what is faster)",
    )


def add_sampling(group: Any) -> None:
    """Add the sampling options to the parser's ``group``. The model supplies options that are not given."""
    group.description = "Options that are not given come from the model's generation_config.json; without one, greedy."
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable tokens (0: all)")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the most probable tokens with total probability P"
    )
    group.add_argument(
        "--min-p", type=float, metavar="P", help="sample from tokens with at least P times the highest probability"
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="lower the probability of tokens seen before (1: off)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="seed of the random numbers (default 0)")


def run(args: argparse.Namespace) -> int:
    """Decode as ``args`` say."""
    refuse_half_a_pair(args)
    refuse_no_timeout(args)
    if args.logprobs and not args.json:
        refuse("--logprobs without --json", "say both")
    from launch.collector import frozen
    from pipeinfer.core.sampling import checked_stops

    read_sampling(args)
    checked_stops(args.stop)
    prompts: list[Prompt] = []

    def check(engine: Engine) -> None:
        prompts.append(read_prompt(args))
        engine.tokenize(prompts[0], args.max_new_tokens, args.chat)

    with Progress("loading the models"):
        opened = open_engine(
            args,
            check,
            policy=args.policy,
            timeout_s=args.timeout,
            trace=args.trace,
            forced_acceptance=args.forced_acceptance,
            random_weights=args.random_weights,
        )
    with frozen(), opened as engine:
        if engine is None:
            return 0  # this rank has served
        sampling = read_sampling(args, engine.sampling)
        completion = show(engine, prompts[0], args, sampling)
        if args.verify:
            verify(engine, completion, args, sampling)
        hosts = {rank["host"] for rank in engine.ranks}
    if args.trace is not None:
        from pipeinfer.cli.plot import draw_traced

        print(draw_traced(args.trace, hosts), file=sys.stderr, flush=True)  # now that every rank has closed its file
    return 0


def probabilities(text: str) -> tuple[float, ...]:
    """Probabilities separated by commas; argparse's error message contains this function's name."""
    return tuple(map(float, text.split(",")))


def token_list(text: str) -> list[int]:
    """Token ids separated by commas; argparse's error message contains this function's name."""
    return [int(number) for number in text.split(",")]


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def read_sampling(args: argparse.Namespace, default: Sampling | None = None) -> Sampling:
    """The sampling options in ``args``, else in ``default``. Raises UserError for invalid numbers."""
    from pipeinfer.core.ports import GREEDY
    from pipeinfer.core.sampling import exact

    said = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    return exact(replace(default or GREEDY, **said))


def open_engine(args: argparse.Namespace, check: Callable[[Engine], object], **more: Any) -> Engine:
    """The engine that ``args`` describe."""
    from pipeinfer.core.config import BUILTIN
    from pipeinfer.engine.engine import Engine

    return Engine(
        target=BUILTIN if args.target is None else args.target,
        draft=args.draft,
        drafters=args.drafters,
        ranks=args.ranks,
        settings=args.set,
        dtype=args.dtype,
        numerics=args.numerics,
        activations=args.activations,
        threads=args.threads,
        tp=args.tp,
        stages=args.stages,
        fused=args.fused,
        context=args.context,
        tokenizer=args.tokenizer,
        calibration=args.calibration,
        max_num_seqs=getattr(args, "max_num_seqs", 1),
        kv_memory=getattr(args, "kv_memory", 0),
        weights_memory=args.weights_memory,
        prefix_caching=getattr(args, "prefix_caching", False),
        check=check,
        **more,
    )


def add_requests(group: Any, max_num_seqs: int) -> None:
    """Options of commands that decode several requests at once, by default ``max_num_seqs``."""
    group.add_argument(
        "--max-num-seqs",
        type=int,
        default=max_num_seqs,
        metavar="N",
        help=f"requests that are decoded at once; others wait (default {max_num_seqs})",
    )
    group.add_argument(
        "--kv-memory",
        default="0",
        metavar="SIZE",
        help="memory of each rank for keys and values, such as 8G (default: what N whole contexts need)",
    )
    group.add_argument(
        "--no-prefix-caching",
        dest="prefix_caching",
        action="store_false",
        help="do not keep what requests have computed for others that begin with the same tokens",
    )


def refuse_half_a_pair(args: argparse.Namespace) -> None:
    """Refuse --draft without --target."""
    named = [name for name in args.draft or () if name != "none" and not is_self_draft(name)]
    if named and not args.target:
        refuse("--draft without --target", "name both models, or neither for the built-in pair")


def refuse_no_timeout(args: argparse.Namespace) -> None:
    """Refuse a --timeout that is no time."""
    if args.timeout < 0:
        refuse(f"--timeout {args.timeout:g}", "use seconds, or 0 to wait for ever")


def read_prompt(args: argparse.Namespace) -> Prompt:
    """The prompt, from where ``args`` say. Raises UserError where it is not text."""
    if args.prompt_tokens is not None:
        return list(args.prompt_tokens)
    if args.prompt is not None:
        where, data = "--prompt", args.prompt.encode("utf-8", "surrogateescape")
    elif args.prompt_file is not None:
        where = args.prompt_file
        try:
            data = Path(args.prompt_file).read_bytes()
        except OSError as error:
            refuse(f"{where} cannot be read ({error.strerror})", "name a readable file")
    else:
        launch = launched()
        if launch is not None and launch.launcher == OPEN_MPI:
            refuse("under Open MPI's mpirun the end of standard input never comes", "use --prompt or --prompt-file")
        where, data = "standard input", sys.stdin.buffer.read()
    try:
        return str(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        refuse(f"{where} is not UTF-8 text (byte {error.start})", "convert it, for instance with iconv")


def show(engine: Engine, prompt: Prompt, args: argparse.Namespace, sampling: Sampling) -> Completion:
    """Stream the answer, then the table; or print JSON. An answer that ends early is printed with the reason."""
    from pipeinfer.cli.live import live
    from pipeinfer.core.metrics import table

    if engine.config.forced_acceptance:
        note("acceptance is forced: the numbers that follow are tokens without meaning")
    if engine.ignored:
        note(f"the model's generation_config.json asks for what is not done here: {', '.join(engine.ignored)}")
    asked = (prompt, args.max_new_tokens, args.ignore_eos, args.chat, sampling, args.stop)
    with contextlib.nullcontext() if args.json else live(engine, args.max_new_tokens) as watch:
        handle = engine.submit(*asked, watch)
        completion = handle.completion
        try:
            for piece in () if args.json else handle:
                print(piece, end="", flush=True)
            handle.result()
        except BaseException as error:
            handle.interrupt(error)
            if args.json:
                print(as_json(completion, args.logprobs), flush=True)
            raise
    if args.json:
        print(as_json(completion, args.logprobs), flush=True)
    else:
        print(flush=True)
        note(f"\n{describe(completion)}\n{table(completion.metrics)}")
    return completion


def as_json(completion: Completion, with_logprobs: bool) -> str:
    """``completion`` as JSON, without the calibration, which only `pipeinfer calibrate` stores."""
    left_out = {"calibrations", "prompt_logprobs", "prompt_top_logprobs"}
    left_out |= {*(() if with_logprobs else ("logprobs",)), *(() if completion.error else ("error",))}
    return json.dumps({name: value for name, value in asdict(completion).items() if name not in left_out})


def note(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr, flush=True)


def describe(completion: Completion) -> str:
    """Policy, ranks and sizes, in one line."""
    config, ranks = completion.config, completion.ranks
    stages = len({tuple(rank["layers"]) for rank in ranks if rank["layers"] is not None})
    forced = ",".join(f"{share:g}" for share in config["forced_acceptance"])
    hosts = len({rank["host"] for rank in ranks})
    dtypes = "/".join(dict.fromkeys((config["dtype"], *config["draft_dtypes"])))
    threads = " or ".join(str(number) for number in sorted({rank["threads"] for rank in ranks}))
    return (
        f"{f'meaningless text, acceptance forced to {forced}; ' if forced else ''}"
        f"policy {config['policy']['name']}, {dtypes}, {len(ranks)} ranks on {hosts} hosts, "
        f"{stages} stages{_shared(config['tp'], ranks)}, {threads} threads a rank; "
        f"{len(completion.prompt_tokens)} prompt tokens, {len(completion.tokens)} new, "
        f"ended by {completion.finish_reason}{_drawn(config['sampling'])}"
    )


def _shared(tp: int, ranks: list[dict[str, Any]]) -> str:
    exchanges = "; ".join(sorted({rank["exchanges"] for rank in ranks if rank["exchanges"]}))
    return f" of {tp} ranks (exchanges {exchanges})" if tp > 1 else ""


def _drawn(sampling: dict[str, Any]) -> str:
    """The sampling options, if not greedy."""
    from pipeinfer.core.ports import GREEDY

    changed = [f"{name} {value:g}" for name, value in sampling.items() if value != getattr(GREEDY, name)]
    return f"; {', '.join(changed)}" if changed else ""


def verify(engine: Engine, completion: Completion, args: argparse.Namespace, sampling: Sampling) -> None:
    """Decode the same prompt plainly in this process alone; raises PipeinferError where the tokens differ."""
    plain = engine.decode_alone(completion.prompt_tokens, args.max_new_tokens, args.ignore_eos, sampling, args.stop)
    if plain != completion.tokens:
        pairs = zip(plain, completion.tokens, strict=False)
        first = next((index for index, (mine, theirs) in enumerate(pairs) if mine != theirs), len(plain))
        dtype = completion.config["dtype"]
        advice = "please report this" if dtype == "fp32" else f"in {dtype} the best two logits often tie: try fp32"
        raise PipeinferError(f"the tokens differ from plain decoding, first at token {first}; {advice}")
    note(f"verified: all {len(plain)} tokens equal plain decoding")


class Progress:
    """A line on a terminal's standard error during a long operation; removed at its end."""

    def __init__(self, what: str) -> None:
        self._what = what if sys.stderr.isatty() else ""

    def __enter__(self) -> None:
        if self._what:
            print(f"{self._what} ...", end="\r", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._what:
            print(" " * (len(self._what) + 4), end="\r", file=sys.stderr, flush=True)
