"""Suites in the simulator: virtual time, a pool of processes, any number of stages. Python costs nothing here."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from pipeinfer.bench.contenders import Contender, variants
from pipeinfer.bench.load import simulate_load
from pipeinfer.bench.sample import Sample, sample
from pipeinfer.bench.scenario import LATE, Scenario
from pipeinfer.sim.world import World, WorldSpec
from stages.models.emulated import plain_tokens

TUNING_SEED = 99
"""Sizes are tuned on another text than the measured one."""
MOST_EVENTS = 100_000_000


def simulate(scenario: Scenario, contender: Contender, seed: int) -> Sample:
    """One request in virtual time; its tokens are checked."""
    request, model, policy = scenario.request(seed), scenario.model(seed), contender.policy
    spec = WorldSpec(
        seed,
        policy,
        scenario.stages(policy),
        (request,),
        model,
        paces=(scenario.layer_s, scenario.draft_s),
        shares=scenario.shares(policy, contender.head_share),
        link=scenario.link,
        context=len(request.prompt) + request.max_new_tokens,
        priors=scenario.priors(policy),
        drafter_beside_orchestrator=scenario.is_rank_0_shared(policy),
        tp=scenario.point.tp,
        late=LATE,
    )
    world = World(spec)
    (answer,) = world.run(MOST_EVENTS)
    if answer.tokens != plain_tokens(model, request.prompt, request.max_new_tokens, frozenset()):
        raise AssertionError(f"seed {seed}, {contender.name}: the tokens are not those of plain decoding")
    assert answer.stats is not None
    traffic = (world.network.messages, world.network.nbytes)
    return sample(answer.tokens, answer.submitted_at, answer.emitted_at, answer.stats, traffic)


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
    simulate_one = simulate_load if scenario.point.requests else simulate
    asked = [
        [pool.submit(simulate_one, scenario, contender, seed) for seed in range(repeats)] for contender in contenders
    ]
    return [[job.result() for job in jobs] for jobs in asked]
