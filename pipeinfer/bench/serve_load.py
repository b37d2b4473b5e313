"""Load on a server: which requests are sent when, and which of them are given up."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeinfer.bench.serve_client import Client, Outcome
from pipeinfer.core.errors import refuse
from pipeinfer.costs.paths import BENCHMARKS

BUILTIN_PROMPTS = BENCHMARKS / "prompts" / "python.jsonl"


@dataclass(frozen=True, slots=True)
class Load:
    """``requests`` requests with ``prompts``, at most ``concurrency`` at a time. ``distinct``: how many different ones;
    they come in turn. ``rate``: requests per second on average, at random times (a Poisson process), or 0: the next
    begins when one has ended. ``seed`` decides times and aborts. ``abort_share`` of the requests are given up after a
    random number of chunks. ``temperature``: None for the server's default; else request k has seed ``seed + k``."""

    prompts: Sequence[str]
    requests: int
    concurrency: int
    max_tokens: int
    distinct: int
    rate: float = 0.0
    seed: int = 0
    abort_share: float = 0.0
    temperature: float | None = None
    ignore_eos: bool = False
    is_chat: bool = False
    model: str = ""
    with_usage: bool = True

    def body(self, key: int) -> dict[str, Any]:
        """The body of distinct request ``key``. Beyond the prompts there are, they come again with a line before."""
        turn, place = divmod(key, len(self.prompts))
        text = f"# {turn}\n{self.prompts[place]}" if turn else self.prompts[place]
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": text}]} if self.is_chat else {"prompt": text}
        asked |= {"model": self.model, "max_tokens": self.max_tokens, "stream": True}
        if self.with_usage:
            asked["stream_options"] = {"include_usage": True}
        if self.temperature is not None:
            asked |= {"temperature": self.temperature, "seed": self.seed + key}
        return asked | ({"ignore_eos": True} if self.ignore_eos else {})

    def due(self) -> Iterator[float]:
        """When each request is due, in seconds after the first; without a rate, all at once."""
        rng, at_s = random.Random(f"times {self.seed}"), 0.0
        for _ in range(self.requests):
            yield at_s
            at_s += rng.expovariate(self.rate) if self.rate else 0.0

    def abort_after(self, index: int) -> int | None:
        """After how many chunks request ``index`` is given up, or None."""
        rng = random.Random(f"abort {self.seed} {index}")
        return rng.randrange(self.max_tokens) if rng.random() < self.abort_share else None


def read_prompts(name: str) -> list[str]:
    """The prompts in the file ``name``, one a line, bare or as {"prompt": ...}; ``builtin``: those of our benchmarks.
    Raises UserError where there are none."""
    path = BUILTIN_PROMPTS if name == "builtin" else Path(name)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        prompts = [json.loads(line)["prompt"] if line.startswith("{") else line for line in lines]
    except OSError as error:
        refuse(f"{path} cannot be read ({error.strerror})", "name a file of prompts with --prompts")
    except (ValueError, KeyError, TypeError) as error:
        refuse(f"{path} is no file of prompts ({error!r})", 'write one a line, bare or as {"prompt": "..."}')
    if not prompts or not all(isinstance(prompt, str) and prompt for prompt in prompts):
        refuse(f"{path} holds no prompts of text", "write one a line")
    return prompts


async def apply(load: Load, client: Client, on_done: Callable[[Outcome], object]) -> tuple[float, float]:
    """Send all requests of ``load``; ``on_done`` takes each outcome. When it began and ended (monotonic seconds).

    A request that is sent late, because ``concurrency`` others run, still counts from when it was due: a slow server
    does not make its own measurement better (coordinated omission). Without a rate it is due when it is sent."""
    began_at = time.monotonic()
    due = iter(enumerate(load.due()))

    async def work() -> None:
        for index, at_s in due:
            if load.rate:
                await asyncio.sleep(began_at + at_s - time.monotonic())
            key = index % load.distinct
            outcome = Outcome(index, key, began_at + at_s if load.rate else time.monotonic())
            await client.ask(load.body(key), outcome, load.abort_after(index))
            on_done(outcome)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(load.concurrency, load.requests)):
            group.create_task(work())
    return began_at, time.monotonic()


async def prepare(load: Load, client: Client) -> Load:
    """``load`` with the server's model, and without usage where the server does not take that field, as one request
    shows, which is not measured. Raises UserError where the server does not serve it."""
    asked = Outcome(-1, 0, time.monotonic())
    await client.ask(load.body(0), asked)
    if asked.error.startswith("HTTP 4"):
        bare, again = replace(load, with_usage=False), Outcome(-1, 0, time.monotonic())
        await client.ask(bare.body(0), again)
        load, asked = (bare, again) if again.is_whole else (load, asked)
    if not asked.is_whole:
        refuse(f"the server does not answer ({asked.error})", "see --url, --model, --api-key and --chat")
    return load
