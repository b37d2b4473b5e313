"""Suites in the simulator: virtual time, a pool of processes, any number of stages. Python costs nothing here."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from pipeinfer.bench.contenders import Contender, variants
from pipeinfer.bench.load import load_of, load_sample
from pipeinfer.bench.sample import Sample
from pipeinfer.bench.scenario import LATE, Scenario
from pipeinfer.sim.world import World, WorldSpec

TUNING_SEED = 99
"""Sizes are tuned on another text than the measured one."""
MOST_EVENTS = 1_000_000_000


def simulate(scenario: Scenario, contender: Contender, seed: int) -> Sample:
    """All requests of a sample in virtual time; see load_sample for what is checked."""
    load, policy = load_of(scenario, seed), contender.policy
    spec = WorldSpec(
        seed,
        policy,
        scenario.stages(policy),
        load.requests,
        scenario.model(seed),
        paces=(scenario.layer_s, scenario.draft_s),
        shares=scenario.shares(policy, contender.head_share),
        link=scenario.link,
        context=scenario.prompt_tokens + scenario.point.tokens,
        priors=scenario.priors(policy),
        drafter_beside_orchestrator=scenario.is_rank_0_shared(policy),
        tp=scenario.point.tp,
        late=LATE,
        max_num_seqs=load.max_num_seqs,
        at_once=True,
        arrivals=load.arrivals,
    )
    world = World(spec)
    answers = world.run(MOST_EVENTS)
    return load_sample(scenario, contender.name, seed, answers, (world.network.messages, world.network.nbytes))


def tuned(scenario: Scenario, contenders: Sequence[Contender], pool: ProcessPoolExecutor) -> list[Contender]:
    """Each of ``contenders`` at its best size for ``scenario``, tried out in the simulator where no formula tells."""
    options = [variants(contender, scenario) for contender in contenders]
    trials = [
        [pool.submit(simulate, scenario, option, TUNING_SEED) for option in some] if len(some) > 1 else []
        for some in options
    ]
    best = []
    for some, tried in zip(options, trials, strict=True):
        speeds = [trial.result().speed for trial in tried]
        best.append(some[speeds.index(max(speeds))] if speeds else some[0])
    return best


def simulate_all(
    scenario: Scenario, contenders: Sequence[Contender], repeats: int, pool: ProcessPoolExecutor
) -> list[list[Sample]]:
    """``repeats`` samples of each contender, every one of a text of its own."""
    asked = [[pool.submit(simulate, scenario, contender, seed) for seed in range(repeats)] for contender in contenders]
    return [[job.result() for job in jobs] for jobs in asked]
