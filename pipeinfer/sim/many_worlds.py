"""Random worlds of many requests: 1 to 16 are decoded at once, and few slots, common prefixes and aborts are frequent.

    python -m pipeinfer.sim.many_worlds --worlds 5000 --schedule all --processes 2

Where slots are few, requests lose theirs and begin again. Prompts begin like others, or go on where another request
ended, so that sequences share slots. The invariants are those of all worlds.
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from typing import Any

from pipeinfer.core.ports import GREEDY, Request, Sampling
from pipeinfer.orchestrator.pool import LEAST_SHARED
from pipeinfer.sim.history import oracle
from pipeinfer.sim.random_worlds import draw_groups, draw_priors, draw_scores, draw_world, main
from pipeinfer.sim.world import WorldSpec
from stages.models.emulated import EmulatedSpec

MANY = ("plain", "rounds", "continuous")
"""Schedules that decode many requests at once."""


def many_world(seed: int, schedule: str = "") -> WorldSpec:
    """The world of many requests that ``seed`` stands for, by ``schedule``, one of MANY if it is named."""
    rng = random.Random(f"many {seed}")
    chosen = schedule or rng.choices(MANY, (1, 2, 5))[0]
    world = draw_scores(random.Random(f"many scores {seed}"), draw_many(rng, draw_world(rng, seed, chosen)))
    return replace(world, priors=draw_priors(rng, world)) if rng.random() < 0.5 else world


def draw_many(rng: random.Random, world: WorldSpec) -> WorldSpec:
    """``world`` with other requests, drawn with ``rng``, many of which are decoded at once."""
    most = rng.choice((1, 2, 3, 3, 4, 4, 6, 8, 8, 12, 16))
    requests = draw_requests(rng, world.model, rng.randint(max(2, most), max(3, min(20, 2 * most))))
    needs = [len(request.prompt) + request.max_new_tokens for request in requests]
    context = max(needs) if rng.random() < 0.8 else max(needs) + 60
    kv_slots, guess_slots = None, world.guess_slots
    if rng.random() < 0.6:
        more = rng.choice((0, 0, rng.randint(0, context), rng.randint(0, sum(needs))))
        kv_slots = context + more
        guess_slots = rng.choice((0, 1, rng.randint(2, 12), guess_slots))
    world = replace(
        world,
        requests=requests,
        max_num_seqs=most,
        context=context,
        kv_slots=kv_slots,
        guess_slots=guess_slots,
        keeps_prefixes=rng.random() < 0.6,
        closes_s=rng.uniform(0, 100 * world.stages) if rng.random() < 0.05 else None,
        **_draw_times(rng, len(requests), world.stages),
    )
    return draw_groups(rng, world)


def draw_requests(rng: random.Random, model: EmulatedSpec, count: int) -> tuple[Request, ...]:
    """``count`` requests to ``model``; in most draws some begin alike."""
    common = [rng.randrange(model.vocab) for _ in range(rng.randint(LEAST_SHARED, 3 * LEAST_SHARED))]
    share = rng.choice((0.0, 0.3, 0.8))
    has_priorities = rng.random() < 0.2
    requests = list[Request]()
    for _ in range(count):
        prompt = _draw_prompt(rng, model.vocab)
        lot = rng.random()
        if lot < share / 4 and requests:  # a second turn of a conversation
            before = rng.choice(requests)
            prompt = [*before.prompt, *oracle(model, before), *prompt[:4]][:60]
        elif lot < share / 2 and requests:
            prompt = list(rng.choice(requests).prompt)
        elif lot < share:
            prompt = common[: rng.choice((len(common), rng.randint(1, len(common))))] + prompt
        requests.append(_draw_request(rng, model.vocab, tuple(prompt)))
        if has_priorities:
            requests[-1] = replace(requests[-1], priority=rng.randint(-1, 1))
    return tuple(requests)


def _draw_prompt(rng: random.Random, vocab: int) -> list[int]:
    return [rng.randrange(vocab) for _ in range(rng.choice((1, 2, rng.randint(1, 12), rng.randint(1, 40))))]


def _draw_request(rng: random.Random, vocab: int, prompt: tuple[int, ...]) -> Request:
    sampling = Sampling(rng.choice((0.75, 1.0)), seed=rng.randrange(2**64)) if rng.random() < 0.5 else GREEDY
    if rng.random() < 0.15:
        sampling = replace(sampling, repetition_penalty=rng.choice((0.8, 1.5)))
    stops = frozenset(rng.randrange(vocab) for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 2))))
    most = rng.choice((1, rng.randint(1, 24), rng.randint(8, 32), rng.randint(16, 40)))
    return Request(prompt, most, stops, sampling)


def _draw_times(rng: random.Random, count: int, stages: int) -> dict[str, Any]:
    """When requests arrive, one by one or in bursts, and when users abort some."""
    kind = rng.choice(("at once", "at once", "at once", "stream", "stream", "stream", "bursts", "bursts", "one by one"))
    gap_s = rng.choice((0.1, 0.5, 2.0)) * stages
    arrivals, now = list[float](), 0.0
    for _ in range(count if kind in ("stream", "bursts") else 0):
        if kind == "stream" or rng.random() < 0.3:
            now -= gap_s * math.log(1.0 - 0.999 * rng.random())
        arrivals.append(now)
    aborts = list[tuple[float, int]]()
    if rng.random() < 0.4:
        end = rng.choice((1.0, 5.0, 30.0, 100.0)) * stages
        share = rng.choice((0.1, 0.3, 0.3, 1.0))
        for number in range(count):
            began = arrivals[number] if arrivals else 0.0
            if rng.random() < share:
                aborts.append((began + rng.uniform(0, end), number))
    return {"arrivals": tuple(arrivals), "at_once": kind != "one by one", "aborts": tuple(aborts)}


if __name__ == "__main__":
    sys.exit(main(draw=many_world, schedules=MANY))
