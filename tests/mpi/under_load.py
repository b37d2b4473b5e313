"""Many random requests on one engine at once: each gets the tokens and log-probabilities that it gets alone.

    python -m tests.mpi.under_load --requests 200 --ranks 1,2,4 --dtypes fp32,bf16

Prompts, lengths, sampling, arrivals and cancellations follow from the seed; what meets what in a run does not. The
reference is plain decoding by one rank, one request at a time, without shared prefixes.
"""

from __future__ import annotations

import argparse
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

from pipeinfer import Engine
from pipeinfer.core.ports import Sampling
from pipeinfer.engine.answer import Completion, Handle

CONTEXT = 256
TEXT = (
    "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n\n\nclass Node:\n"
    "    def __init__(self, value):\n        self.value = value\n        self.next = None\n"
)
SAMPLINGS = (
    {},
    {},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "top_logprobs": 3},
    {"temperature": 0.7, "min_p": 0.05, "presence_penalty": 0.5},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.4, "logit_bias": ((10, -2.0), (32, 1.5))},
    {"top_logprobs": 2},
    {"temperature": 0.9, "prompt_logprobs": 2},
)
HANG_S = 600.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request. ``cancelled_after``: pieces of text after which its user goes, None if never."""

    prompt: str
    tokens: int
    sampling: Sampling
    cancelled_after: int | None
    priority: int


def requests(count: int, seed: int) -> list[Asked]:
    """``count`` requests; some begin alike."""
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        start = TEXT[: dice.choice((0, 20, 60, 150))]
        rest = TEXT[dice.randrange(60) :][: dice.randrange(1, 80)]
        sampling = Sampling(**dice.choice(SAMPLINGS), seed=dice.randrange(2**32))  # type: ignore[arg-type]
        cancelled = dice.randrange(1, 8) if dice.random() < 0.15 else None
        found.append(
            Asked(f"{start}{dice.randrange(99)}{rest}", dice.randrange(1, 56), sampling, cancelled, dice.randrange(3))
        )
    return found


def alone(asked: Sequence[Asked], dtype: str) -> list[Completion]:
    """What plain decoding answers, one request at a time."""
    with Engine(policy="plain", dtype=dtype, context=CONTEXT, max_num_seqs=1, prefix_caching=False) as engine:
        assert engine is not None
        return [engine.generate(one.prompt, one.tokens, ignore_eos=True, sampling=one.sampling) for one in asked]


def together(engine: Engine, asked: Sequence[Asked], at_once: int) -> list[Completion]:
    """The answers of ``engine``, ``at_once`` users at a time, each with the next request when one is over."""
    todo: SimpleQueue[int] = SimpleQueue()
    for index in range(len(asked)):
        todo.put(index)
    answers: dict[int, Completion] = {}

    def use() -> None:
        while not todo.empty():
            index = todo.get()
            one = asked[index]
            handle = engine.submit(one.prompt, one.tokens, True, sampling=one.sampling, priority=one.priority)
            answers[index] = _take(handle, one.cancelled_after)

    users = [threading.Thread(target=use, daemon=True) for _ in range(at_once)]
    for user in users:
        user.start()
    for user in users:
        user.join(HANG_S)
    return [answers[index] for index in range(len(asked))]


def _take(handle: Handle, cancelled_after: int | None) -> Completion:
    for count, _ in enumerate(handle, 1):
        if count == cancelled_after:
            handle.cancel()
    return handle.result(HANG_S)


def differences(asked: Sequence[Asked], found: Sequence[Completion], wanted: Sequence[Completion]) -> list[str]:
    """A line for each request that did not get what it gets alone."""
    lines = []
    for index, (one, here, there) in enumerate(zip(asked, found, wanted, strict=True)):
        count = len(here.tokens) if here.finish_reason == "cancelled" else len(there.tokens)
        same = here.finish_reason == there.finish_reason or (
            one.cancelled_after is not None and here.finish_reason == "cancelled"
        )
        for what in ("tokens", "logprobs", "top_logprobs"):
            same &= getattr(here, what) == getattr(there, what)[:count]
        for what in ("prompt_logprobs", "prompt_top_logprobs"):
            told = len(getattr(here, what)) if here.finish_reason == "cancelled" else None
            same &= getattr(here, what) == getattr(there, what)[:told]
        if not same:
            lines.append(f"request {index}, {here.finish_reason}: {here.tokens}, alone {there.tokens} ({one})")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and print a line for each engine."""
    parser = argparse.ArgumentParser(description="many random requests at once, compared with each of them alone")
    parser.add_argument("--requests", type=int, default=200, metavar="N")
    parser.add_argument("--ranks", default="1,2,4", metavar="N,N,...")
    parser.add_argument("--dtypes", default="fp32,bf16", metavar="T,T,...")
    parser.add_argument("--policies", default="plain,continuous", metavar="P,P,...")
    parser.add_argument("--at-once", type=int, default=24, metavar="N", help="users at a time")
    parser.add_argument("--max-num-seqs", type=int, default=8, metavar="N")
    parser.add_argument("--kv-memory", default="0", metavar="SIZE", help="little enough, and requests are preempted")
    parser.add_argument("--tp", type=int, default=1, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    args = parser.parse_args(arguments)
    asked, bad = requests(args.requests, args.seed), 0
    for dtype in args.dtypes.split(","):
        wanted = alone(asked, dtype)
        for ranks in map(int, args.ranks.split(",")):
            for policy in args.policies.split(","):
                with Engine(
                    ranks=ranks, policy=policy, dtype=dtype, context=CONTEXT, max_num_seqs=args.max_num_seqs,
                    kv_memory=args.kv_memory, tp=args.tp,
                ) as engine:  # fmt: skip
                    assert engine is not None
                    found = together(engine, asked, args.at_once)
                lines = differences(asked, found, wanted)
                ended = sum(one.finish_reason != "cancelled" for one in found)
                print(
                    f"{dtype}, {ranks} ranks, {policy}: {ended} of {len(found)} ended, {len(lines)} differ", flush=True
                )
                print(*lines, sep="\n", end="\n" if lines else "")
                bad += len(lines)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
