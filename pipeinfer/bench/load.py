"""Many requests at once, simulated or emulated: what all of them get per second, and how many get what they should.

Arrivals. "at once": as many requests as the point says begin together, and none comes later. Between BEGIN and END of
all tokens every request is decoding, so the throughput between these two is that of as many requests that never end.
"poisson", "bursts": ROUNDS times as many come, one by one or BURST together, at the rate at which plain decoding would
have as many active if none waited for another one. At most twice as many are decoded at once.

Goodput: tokens per second of the requests with TTFT at most TTFT trips of one row through the pipeline, and TPOT at
most TPOT of them: a token should come no later than in plain decoding of a request that is alone, nearly.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeinfer.bench.ideal_load import reference
from pipeinfer.bench.sample import Sample, sample
from pipeinfer.bench.scenario import Scenario
from pipeinfer.core.metrics import measure, percentile
from pipeinfer.core.ports import Request
from pipeinfer.sim.world import Answer
from speculation.schedules.policy import CONTINUOUS
from stages.models.emulated import plain_tokens

BEGIN, END = 0.25, 0.7
ROUNDS, BURST = 3, 8
TTFT, TPOT = 8.0, 1.25
CHECKED = 3
"""Requests whose tokens are compared with plain decoding."""


@dataclass(frozen=True, slots=True)
class Load:
    """The requests of a sample. ``arrivals``: when they come, in seconds; empty where they begin at once.
    ``max_num_seqs``: how many are decoded at once."""

    requests: tuple[Request, ...]
    arrivals: tuple[float, ...] = ()
    max_num_seqs: int = 1


def load_of(scenario: Scenario, seed: int) -> Load:
    """What comes to ``scenario`` in the sample ``seed``: one request where its point does not say how many."""
    point = scenario.point
    if not point.requests:
        return Load((scenario.request(seed),))
    arrivals = arrival_times(scenario, seed)
    numbers = range(len(arrivals) or point.requests)
    requests = tuple(scenario.request(1000 * seed + number) for number in numbers)
    return Load(requests, arrivals, point.requests * (2 if arrivals else 1))


def load_sample(
    scenario: Scenario, who: str, seed: int, answers: Sequence[Answer], traffic: tuple[int, int]
) -> Sample:
    """What the job of ``who`` gave to ``load_of(scenario, seed)``; the tokens of some ``answers`` are checked."""
    model, requests = scenario.model(seed), load_of(scenario, seed).requests
    for answer in answers[:: max(1, len(answers) // CHECKED)]:
        request = requests[answer.number]
        if answer.tokens != plain_tokens(model, request.prompt, request.max_new_tokens, frozenset()):
            raise AssertionError(f"seed {seed}, {who}: request {answer.number} is not that of plain decoding")
    if not scenario.point.requests:
        (answer,) = answers
        assert answer.stats is not None
        return sample(answer.tokens, answer.submitted_at, answer.emitted_at, answer.stats, traffic)
    return _sample(scenario, answers, traffic)


def arrival_times(scenario: Scenario, seed: int) -> tuple[float, ...]:
    """When the requests come, in seconds; nothing where they begin at once."""
    point = scenario.point
    if point.arrivals == "at once":
        return ()
    rng = random.Random(seed)
    together = BURST if point.arrivals == "bursts" else 1
    gap_s = together * point.tokens * scenario.trip_s(CONTINUOUS, 1) / point.requests
    times, now = list[float](), 0.0
    while len(times) < ROUNDS * point.requests:
        times += [now] * together
        now += rng.expovariate(1 / gap_s)
    return tuple(times[: ROUNDS * point.requests])


def _sample(scenario: Scenario, answers: Sequence[Answer], traffic: tuple[int, int]) -> Sample:
    """What was measured. ``tpot_ms`` is the time per token of all requests together; that of one request is
    ``request_tpot_ms``, and ``request_tpot_p99_ms`` and ``ttft_p99_ms`` are those that 99 % of them do not exceed."""
    found = list[dict[str, Any]]()
    for answer in answers:
        assert answer.stats is not None
        found.append(measure(answer.submitted_at, answer.emitted_at, answer.stats))
    metrics: dict[str, Any] = {key: _middle([one[key] for one in found]) for key in found[0]}
    speed = throughput(answers, *((BEGIN, END) if scenario.point.arrivals == "at once" else (0.0, 1.0)))
    trip_ms = 1e3 * scenario.trip_s(CONTINUOUS, 1)
    good = sum(one["ttft_ms"] <= TTFT * trip_ms and one["tpot_ms"] <= TPOT * trip_ms for one in found) / len(found)
    metrics |= {"request_tpot_ms": metrics["tpot_ms"], "tpot_ms": 1e3 / speed, "goodput": good * speed}
    metrics |= {"request_tpot_p99_ms": percentile([one["tpot_ms"] for one in found], 0.99)}
    metrics |= {"ttft_p99_ms": percentile([one["ttft_ms"] for one in found], 0.99)}
    tokens = [token for answer in answers for token in answer.tokens]
    messages, nbytes = traffic
    return Sample(tuple(tokens), metrics, messages / len(tokens), nbytes / len(tokens))


def _middle(values: Sequence[Any]) -> Any:
    """The median, of every entry where values have several."""
    if isinstance(values[0], dict):
        return {key: _middle([value[key] for value in values]) for key in values[0]}
    return percentile(values, 0.5)


def throughput(answers: Sequence[Answer], begin: float, end: float) -> float:
    """Tokens per second of all ``answers`` between these shares of all tokens."""
    emissions = sorted(emission for answer in answers for emission in answer.emitted_at)
    total, count, began = sum(tokens for _, tokens in emissions), 0, (emissions[0][0], 0)
    for when, tokens in emissions:
        count += tokens
        if count <= begin * total:
            began = when, count
        elif count >= end * total:
            break
    return (count - began[1]) / (when - began[0])


def reference_speed(scenario: Scenario) -> float:
    """Tokens per second of the reference (see ideal_load) where requests begin at once; 0 for other arrivals."""
    if scenario.point.arrivals != "at once":
        return 0.0
    return reference(
        scenario.stages(CONTINUOUS),
        scenario.point.requests,
        scenario.acceptance,
        lambda rows: scenario.stage_s(CONTINUOUS, rows),
        lambda rows: scenario.draft_s(rows, scenario.context),
    )
