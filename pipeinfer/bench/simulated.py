"""Suites in the simulator: virtual time, a pool of processes, any number of stages. Python costs nothing here."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from pipeinfer.bench.entrants import Entrant, variants
from pipeinfer.bench.sample import Sample, sample
from pipeinfer.bench.scene import Scene
from pipeinfer.sim.world import World, WorldSpec
from stages.models.emulated import plain_tokens

TUNING_SEED = 99
"""Sizes are chosen on another text than they are measured on."""
MOST_EVENTS = 100_000_000


def simulate(scene: Scene, entrant: Entrant, seed: int) -> Sample:
    """One request in virtual time; its tokens are checked."""
    request, model, policy = scene.request(seed), scene.model(seed), entrant.policy
    spec = WorldSpec(
        seed,
        policy,
        scene.stages(policy),
        (request,),
        model,
        paces=(scene.layer_s, scene.draft_s),
        shares=scene.shares(policy, entrant.head_share),
        link=scene.link,
        context=len(request.prompt) + request.max_new_tokens,
    )
    world = World(spec)
    (answer,) = world.run(MOST_EVENTS)
    if answer.tokens != plain_tokens(model, request.prompt, request.max_new_tokens, frozenset()):
        raise AssertionError(f"seed {seed}, {entrant.name}: the tokens are not those of plain decoding")
    assert answer.tally is not None
    traffic = (world.network.messages, world.network.nbytes)
    return sample(answer.tokens, answer.submitted_at, answer.emitted_at, answer.tally, traffic)


def tuned(scene: Scene, entrants: Sequence[Entrant], pool: ProcessPoolExecutor) -> list[Entrant]:
    """Each of ``entrants`` at its best size for ``scene``, tried out in the simulator where no formula tells."""
    options = [variants(entrant, scene) for entrant in entrants]
    trials = [
        [pool.submit(simulate, scene, option, TUNING_SEED) for option in some] if len(some) > 1 else []
        for some in options
    ]
    best = []
    for some, tried in zip(options, trials, strict=True):
        speeds = [trial.result().speed for trial in tried]
        best.append(some[speeds.index(max(speeds))] if speeds else some[0])
    return best


def simulate_all(
    scene: Scene, entrants: Sequence[Entrant], repeats: int, pool: ProcessPoolExecutor
) -> list[list[Sample]]:
    """``repeats`` samples of each entrant, every one of a text of its own."""
    asked = [[pool.submit(simulate, scene, entrant, seed) for seed in range(repeats)] for entrant in entrants]
    return [[job.result() for job in jobs] for jobs in asked]
