"""One measurement of a running server by the client of `pipeinfer bench serve`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pipeinfer.bench.serve_client import Client, Outcome
from pipeinfer.bench.serve_http import Address
from pipeinfer.bench.serve_load import Load, apply
from pipeinfer.bench.serve_measures import tpot_ms, ttft_ms
from pipeinfer.core.errors import PipeinferError

WARM_REQUESTS = 4
WARM = "# {}: warm-up\n{}"
"""Prompts of the warm-up begin otherwise than those that are measured, so that nothing is kept of them."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a load found: tokens per second of all requests, TTFT and TPOT of each in milliseconds, and their texts.
    ``input_tokens``: of all prompts."""

    tokens_per_s: float
    ttft_ms: Sequence[float]
    tpot_ms: Sequence[float]
    input_tokens: int
    texts: Sequence[str] = field(repr=False)


def load_of(prompts: Sequence[str], requests: int, clients: int, tokens: int) -> Load:
    """Greedy requests that all differ, each of exactly so many new tokens."""
    return Load(prompts, requests, clients, tokens, distinct=requests, temperature=0.0, ignore_eos=True)


def measure(url: str, load: Load, timeout_s: float) -> Sample:
    """Warm up the server at ``url``, then send it ``load``. Raises PipeinferError where a request is not answered in
    full."""
    return asyncio.run(_measure(url, load, timeout_s))


async def _measure(url: str, load: Load, timeout_s: float) -> Sample:
    client = Client(Address.read(url), None, False, timeout_s)
    try:
        load = replace(load, model=(await client.models())[0])
        warm = [WARM.format(index, prompt) for index, prompt in enumerate(load.prompts)]
        count = max(WARM_REQUESTS, load.concurrency)
        await _answers(url, replace(load, prompts=warm, requests=count, distinct=count), client)
        outcomes, seconds = await _answers(url, load, client)
    finally:
        client.close()
    return Sample(
        sum(one.new_tokens for one in outcomes) / seconds,
        [ttft_ms(one) for one in outcomes],
        [each for one in outcomes if (each := tpot_ms(one)) is not None],
        sum(one.prompt_tokens or 0 for one in outcomes),
        [one.text for one in outcomes],
    )


async def _answers(url: str, load: Load, client: Client) -> tuple[list[Outcome], float]:
    """The answers in the order of the requests, and how long all took."""
    outcomes: list[Outcome] = []
    began_at, ended_at = await apply(load, client, outcomes.append)
    for one in outcomes:
        if not one.is_whole or one.new_tokens != load.max_tokens:
            raise PipeinferError(f"{url}: request {one.index} has {one.new_tokens} tokens ({one.error or 'it ended'})")
    return sorted(outcomes, key=lambda one: one.index), ended_at - began_at
