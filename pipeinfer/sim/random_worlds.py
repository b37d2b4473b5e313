"""Random worlds: every shape a pipeline may have, drawn from a seed, and every invariant checked in each.

    python -m pipeinfer.sim.random_worlds --worlds 5000 --schedule all --processes 2

A world that fails is reproduced by its seed (and its schedule, where one was named): ``--worlds 1 --seed <seed>
--schedule <schedule>``. What is drawn leans towards the edges (``max_ahead`` 0, no slots, all advice lost, a draft that
is always or never right), because that is where faults hide.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

from pipeinfer.core.links import Link
from pipeinfer.core.ports import GREEDY, Request, Sampling
from pipeinfer.runtime.pass_times import ROWS
from pipeinfer.sim.bounds import Bounds
from pipeinfer.sim.draft_invariants import Guessed
from pipeinfer.sim.history import History, InvariantBroken
from pipeinfer.sim.invariants import Advice, EndsOnce, Exact, Forced, InOrder
from pipeinfer.sim.lively import Lively
from pipeinfer.sim.replay import Recorder, Wire, replay
from pipeinfer.sim.schedule_invariants import schedule_invariants
from pipeinfer.sim.slot_invariants import Replicas, Slots
from pipeinfer.sim.visible_invariants import Visible
from pipeinfer.sim.world import Checker, World, WorldSpec
from speculation.schedules.cost_curve import Costs, Priors
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import PLACEMENTS
from stages.models.emulated import EmulatedSpec, spread

MOST_EVENTS = 200_000
SCHEDULES = ("plain", "rounds", "pipeinfer", "continuous")
MOST_FAILURES = 3
CHUNK = 25
"""Worlds that a process takes at a time."""
Draw = Callable[[int, str], WorldSpec]
"""Makes a world of a seed and the name of a schedule."""


@dataclass(frozen=True, slots=True)
class Report:
    """What one checked world did."""

    events: int
    messages: int
    tokens: int


def random_world(seed: int, schedule: str = "") -> WorldSpec:
    """The world that ``seed`` stands for, or the one of ``schedule`` that it stands for; in a third of them two
    requests are decoded at once, if the schedule can. In half of them it is known what passes cost, more or less. In a
    quarter of them groups share the stages, in a sixth log-probabilities of prompts are wanted. Worlds with more
    requests are those of many_worlds.py."""
    world = draw_world(random.Random(seed), seed, schedule)
    world = draw_groups(random.Random(f"groups {seed}"), world)
    dice = random.Random(f"priors {seed}")
    if dice.random() < 0.5:
        world = replace(world, priors=draw_priors(dice, world))
    world = draw_scores(random.Random(f"scores {seed}"), world)
    is_pair = random.Random(f"overlap {seed}").random() < 1 / 3
    return replace(world, max_num_seqs=2, at_once=True) if is_pair else world


def draw_world(rng: random.Random, seed: int, schedule: str = "") -> WorldSpec:
    """A world drawn with ``rng``; ``seed`` goes on to its network and its model. See draw_policy for ``schedule``.

    Every edge is drawn now and then; a fifth of the worlds are busy pipelines without one, because the finer faults
    show only where trees are wide, runs many, and cancels faster than the runs."""
    if rng.random() < 0.2 and schedule in ("", "continuous"):
        return _busy_world(rng, seed)
    stages = 12 if rng.random() < 0.02 else rng.choice((1, 2, 2, 3, 3, 4, 4, 5, 6))
    model = _draw_model(rng, seed, stages)
    requests = tuple(_draw_request(rng, model.vocab) for _ in range(rng.choice((1, 1, 1, 2, 2, 3))))
    need = max(len(request.prompt) + request.max_new_tokens for request in requests)
    policy = draw_policy(rng, schedule)
    if model.ranks[0] == 1.0 and rng.random() < 0.6:
        policy = replace(policy, topk=1)  # a draft that never guesses wrong: the invariant about it is sharpest there
    equal = rng.random() < 0.5
    few_slots = rng.choice((0, 1, 2, rng.randint(3, 12), rng.randint(3, 12)))
    return WorldSpec(
        seed=seed,
        policy=policy,
        stages=stages,
        requests=requests,
        stage_s=(1.0,) if equal else tuple(rng.choice((0.2, 0.7, 1.0, 1.3, 3.0)) for _ in range(stages)),
        draft_s=rng.choice((0.01, 0.05, 0.1, 0.1, 0.2, 0.3, 1.0, 5.0)),
        row_cost=rng.choice((0.0, 0.0, 0.05, 0.3)),
        link=_draw_link(rng),
        context=need if rng.random() < 0.5 else 128,
        placement=rng.choices(PLACEMENTS, (7, 2, 1))[0],
        drafter_beside_orchestrator=rng.random() < 0.5,
        drafters=rng.choice((0, 1, 1, 1, 1, 1, 2, 2, 3, 3)),
        guess_slots=few_slots if rng.random() < 0.25 else None,
        silent_s=rng.uniform(1, 30) if policy.schedule == "continuous" and rng.random() < 0.1 else None,
        **_draw_user(rng, stages, len(requests), 0.15),
        **_draw_faults(rng, model),
        draft_contexts=tuple(rng.choice((0, 1, 5, rng.randint(1, need))) for _ in range(3) if rng.random() < 0.15),
    )


def draw_priors(rng: random.Random, world: WorldSpec) -> Priors:
    """What passes cost in ``world``, each time with an error, which is nothing, moderate, or beyond reason."""
    error = rng.choice((0.0, 0.1, 0.5, 3.0))
    stages = [world.stage_s[index % len(world.stage_s)] for index in range(world.stages)]
    known = [rows for rows in ROWS if rng.random() < 0.9]

    def times(pass_s: float) -> Costs:
        costs = ((rows, pass_s * (1 + world.row_cost * (rows - 1))) for rows in known)
        return tuple((rows, seconds * math.exp(rng.gauss(0, error))) for rows, seconds in costs)

    return Priors(times(max(stages)), times(sum(stages)), times(world.draft_s) if rng.random() < 0.9 else ())


def draw_groups(rng: random.Random, world: WorldSpec) -> WorldSpec:
    """``world``, in a quarter of the draws with groups of ranks that may be late, and whose exchanges may cost as much
    as layers. Tokens stay the same."""
    if rng.random() >= 0.25:
        return world
    late, exchange_s = rng.choice((0.0, 0.1, 1.0)), rng.choice((0.0, 0.01, 0.5))
    return replace(world, tp=rng.choice((2, 2, 3, 4, 8)), late=late, exchange_s=exchange_s)


def draw_scores(rng: random.Random, world: WorldSpec) -> WorldSpec:
    """``world``, in a sixth of the draws with requests that want log-probabilities of their prompts, some of them
    nothing else. All other tokens stay the same."""
    if rng.random() >= 1 / 6:
        return world
    requests = []
    for request in world.requests:
        if rng.random() < 0.6:
            sampling = replace(request.sampling, prompt_logprobs=rng.choice((0, 0, 3)))
            most = 0 if rng.random() < 0.3 else request.max_new_tokens
            request = replace(request, sampling=sampling, max_new_tokens=most)
        requests.append(request)
    return replace(world, requests=tuple(requests))


def _busy_world(rng: random.Random, seed: int) -> WorldSpec:
    stages = rng.randint(3, 6)
    draft_batch = rng.randint(2, 4)
    topk, reuse = rng.randint(2, 4), rng.random() < 0.8
    policy = Policy(
        "busy",
        max_rows=rng.randint(4, 8),
        topk=topk,
        draft_batch=draft_batch,
        max_ahead=rng.randint(12, 24),
        reuse=reuse,
    )
    ranks = rng.choice((spread(0.3, choices=4), spread(0.5, choices=3)))
    return WorldSpec(
        seed=seed,
        policy=policy,
        stages=stages,
        requests=(Request((1, 2, 3), rng.randint(10, 24)),),
        model=EmulatedSpec(stages, rng.choice((11, 60)), seed & 0xFFFF, ranks, rng.choice((None, (0.5, 0.45, 0.4)))),
        draft_s=rng.choice((0.05, 0.1, 0.2)),
        link=Link(delay_s=rng.choice((1e-4, 0.1)), control_repeat=rng.choice((0.0, 0.2))),
        context=64,
        drafter_beside_orchestrator=rng.random() < 0.5,
        **_draw_user(rng, stages, 1, 0.25),
    )


def _draw_user(rng: random.Random, stages: int, requests: int, share: float) -> dict[str, Any]:
    """What the user does: in a ``share`` of the worlds abort one request at some moment, in others all of them."""
    aborts: tuple[tuple[float, int], ...] = ((rng.uniform(0, 12 * stages), 0),) if rng.random() < share else ()
    at_once = rng.random() < 0.5
    if requests > 1 and rng.random() < 0.5:
        most = rng.choice((1.0, 12.0 * stages, 60.0 * stages))
        chosen = rng.sample(range(requests), rng.randint(1, requests))
        aborts = tuple((rng.uniform(0, most), number) for number in chosen)
    closes_s = rng.uniform(0, 40 * stages) if rng.random() < 0.05 else None
    return {"at_once": at_once, "aborts": aborts, "closes_s": closes_s}


def _draw_faults(rng: random.Random, model: EmulatedSpec) -> dict[str, Any]:
    """``model``, whose numbers are not finite now and then in some worlds."""
    if rng.random() < 0.75:
        return {"model": model}
    return {"model": replace(model, faulty=rng.choice((0.0, 0.02, 0.1)), draft_faulty=rng.choice((0.0, 0.1, 1.0)))}


def _draw_model(rng: random.Random, seed: int, stages: int) -> EmulatedSpec:
    wide, narrow = spread(0.3, choices=4), spread(0.6)
    odds = (wide, wide, narrow, narrow, spread(0.9), (0.7,), (0.0,), (1.0,))
    return EmulatedSpec(
        layers=stages * rng.choice((1, 1, 1, 2, 3)) + rng.choice((0, 0, 1)),
        vocab=rng.choice((2, 3, 5, 11, 60)),
        seed=seed & 0xFFFF,
        ranks=rng.choice(odds),
        claims=rng.choice((None, None, None, None, (0.5, 0.5, 0.5), (0.01,), (1.0, 1.0, 1.0))),
    )


def _draw_request(rng: random.Random, vocab: int) -> Request:
    prompt = tuple(rng.randrange(vocab) for _ in range(rng.choice((1, 2, rng.randint(1, 12), rng.randint(1, 60)))))
    stops = frozenset(rng.randrange(vocab) for _ in range(rng.choice((0, 0, 0, 0, 1, 1, 2))))
    most = rng.choice((1, rng.randint(1, 8), rng.randint(1, 24), rng.randint(1, 48), rng.randint(12, 48)))
    sampling = Sampling(0.75, seed=rng.randrange(2**64)) if rng.random() < 0.4 else GREEDY
    if rng.random() < 0.1:
        sampling = replace(sampling, repetition_penalty=1.5)
    return Request(prompt, most, stops, sampling)


def draw_policy(rng: random.Random, schedule: str = "") -> Policy:
    """A policy drawn with ``rng``, of this ``schedule`` (``plain`` too) or any."""
    schedule = schedule or rng.choices(("plain", "rounds", "pipeinfer", "continuous"), (7, 12, 12, 69))[0]
    chunk = rng.choice((1, 2, 7, 16, rng.randint(1, 64), 64))
    if schedule == "plain":
        return Policy("plain", speculate=False, window=rng.choice((0, 1, 3)), prefill_chunk=chunk)
    deep = rng.randint(3, 24)
    prompt_lookup = rng.choice((0, 0, 0, 1, 5, 20))
    if schedule == "rounds":
        num_steps, topk, draft_batch = rng.randint(1, 6), rng.randint(1, 4), rng.randint(1, 6)
        return Policy(
            "rounds", schedule="rounds", num_steps=num_steps, max_rows=rng.randint(1, 10), topk=topk,
            draft_batch=draft_batch, max_ahead=rng.choice((0, 2, num_steps * draft_batch)),
            prefill_chunk=chunk, prompt_lookup=prompt_lookup, calibrate=rng.random() < 0.3,
        )  # fmt: skip
    if schedule == "pipeinfer":
        return Policy(
            "pipeinfer", schedule="pipeinfer", max_rows=rng.randint(1, 5), max_ahead=rng.choice((0, 5, 64)),
            window=rng.choice((0, 1, 2, 20)), p_accept=rng.choice((0.0, 0.1, 0.5, 0.9)),
            p_recovery=rng.choice((0.0, 0.4)), p_decay=rng.choice((0.0, 0.01, 0.2)),
            cancel=rng.choice(("relay", "direct", "off")), cancel_rows=rng.random() < 0.2, prefill_chunk=chunk,
        )  # fmt: skip
    return Policy(
        "random",
        max_rows=rng.randint(1, 8),
        topk=rng.randint(1, 4),
        draft_batch=rng.randint(1, 4),
        max_ahead=rng.choice((0, 1, 2, deep, deep, deep, deep, deep, deep)),
        window=rng.choice((0, 0, 0, 0, 0, 0, 1, 2, 3, 5)),
        min_path_prob=rng.choice((0.0, 0.0, 0.0, 0.0, 0.0, 0.02, 0.02, 0.2, 1.0)),
        cancel=rng.choice(("direct", "direct", "relay", "off")),
        cancel_rows=rng.random() < 0.8,
        reuse=rng.random() < 0.7,
        calibrate=rng.random() < 0.5,
        govern=rng.random() < 0.4,
        launch_delay=rng.random() < 0.7,
        prompt_lookup=prompt_lookup,
        prefill_chunk=chunk,
    )


def _draw_link(rng: random.Random) -> Link:
    return Link(
        delay_s=rng.choice((0.0, 1e-4, 1e-4, 0.1, 0.1, 1.0, 4.0)),
        jitter_s=rng.choice((0.0, 0.0, 0.0, 0.1, 2.0)),
        bandwidth=rng.choice((1e9, 1e9, 1e9, 1000.0, 200.0)),
        control_loss=rng.choice((0.0, 0.0, 0.0, 0.3, 1.0)),
        control_repeat=rng.choice((0.0, 0.0, 0.5)),
    )


def every_invariant(spec: WorldSpec) -> tuple[Checker, ...]:
    """A fresh checker for each invariant that one world can test; the history, which the others read, comes first."""
    history = History(spec)
    kinds = [Exact, EndsOnce, Slots, Replicas, InOrder, Advice, Forced, Guessed, Lively]
    kinds += [Visible] if spec.max_num_seqs > 1 else []
    readers = [make(history) for make in kinds]
    return history, *readers, *schedule_invariants(history), Bounds(spec), Wire()


def check_world(spec: WorldSpec, twin: bool = True) -> Report:
    """Run ``spec`` under every invariant and replay it; raises what failed: InvariantBroken, or a refusal.

    With ``twin``, a world where advice was followed runs again without it: it may change time, never tokens (L6). Where
    a user aborts or closes at some moment, time decides how many tokens there are."""
    recorder = Recorder()
    world = World(spec, (*every_invariant(spec), recorder))
    answers = world.run(MOST_EVENTS)
    replay(spec, recorder.trace)
    is_timeless = not spec.aborts and spec.closes_s is None
    if twin and is_timeless and any(answer.stats and answer.stats.tombstones for answer in answers):
        off = replace(spec, policy=replace(spec.policy, cancel="off"))
        with_cancels, without = ([one.tokens for one in found] for found in (answers, World(off).run(MOST_EVENTS)))
        if with_cancels != without:
            raise InvariantBroken(f"L6: with cancels the tokens are {with_cancels}, without {without}")
    return Report(world.events, world.network.messages, sum(len(answer.tokens) for answer in answers))


def first_failures(
    seeds: Sequence[int], most: int = MOST_FAILURES, schedule: str = "", draw: Draw = random_world
) -> tuple[list[Report], list[str]]:
    """Check the worlds that ``draw`` makes of ``seeds`` (and ``schedule``) until ``most`` have failed: reports of the
    good ones, a line for each bad one."""
    reports, failures = list[Report](), list[str]()
    option = f" --schedule {schedule}" if schedule else ""
    for seed in seeds:
        try:
            reports.append(check_world(draw(seed, schedule)))
        except Exception as error:  # any exception at all condemns a world
            failures.append(
                f"seed {seed}: {type(error).__name__}: {error}\n"
                f"  again: python -m pipeinfer.sim.{draw.__name__}s --worlds 1 --seed {seed}{option}"
            )
            if len(failures) == most:
                break
    return reports, failures


@dataclass(slots=True)
class Survey:
    """What many worlds did; ``wall_s``: seconds of real time."""

    worlds: int = 0
    events: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.worlds} worlds kept every invariant: {self.events} events, {self.tokens} tokens "
            f"in {self.wall_s:.1f} s; {self.worlds / self.wall_s:.1f} worlds/s, "
            f"{self.events / self.wall_s:.0f} events/s"
        )


def survey(seeds: Sequence[int], schedule: str = "", processes: int = 1, draw: Draw = random_world) -> Survey:
    """Check the worlds that ``draw`` makes of ``seeds`` (and ``schedule``) on so many processes until a few have
    failed."""
    found, began = Survey(), time.perf_counter()
    chunks = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    check = partial(first_failures, schedule=schedule, draw=draw)
    with contextlib.ExitStack() as stack:
        answers: Iterable[tuple[list[Report], list[str]]] = map(check, chunks)
        if processes > 1:
            pool = stack.enter_context(ProcessPoolExecutor(processes, get_context("spawn")))
            stack.callback(pool.shutdown, cancel_futures=True)
            answers = pool.map(check, chunks)
        for reports, failures in answers:
            found.worlds += len(reports)
            found.events += sum(report.events for report in reports)
            found.tokens += sum(report.tokens for report in reports)
            found.failures += failures
            if len(found.failures) >= MOST_FAILURES:
                break
    found.wall_s = time.perf_counter() - began
    return found


def main(
    arguments: Sequence[str] | None = None, draw: Draw = random_world, schedules: Sequence[str] = SCHEDULES
) -> int:
    """The command line; ``draw`` makes the worlds, by one of ``schedules`` or by any."""
    parser = argparse.ArgumentParser(
        prog=f"pipeinfer.sim.{draw.__name__}s", description="Check the invariants in random worlds."
    )
    parser.add_argument("--worlds", type=int, default=2000, help="of each schedule")
    parser.add_argument("--seed", type=int, default=0, help="of the first world")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--schedule", default="", choices=["", "all", *schedules], help="only this one, or all one by one; else mixed"
    )
    options = parser.parse_args(arguments)
    failed = False
    for schedule in schedules if options.schedule == "all" else (options.schedule,):
        seeds = range(options.seed, options.seed + options.worlds)
        found = survey(seeds, schedule, options.processes, draw)
        print(f"{schedule or 'mixed'}: {found}", flush=True)
        print("\n".join(found.failures), end="\n" if found.failures else "", flush=True)
        failed |= bool(found.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
