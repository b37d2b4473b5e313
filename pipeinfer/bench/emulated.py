"""Suites emulated over MPI: ranks, messages, machines and tokens are real; models are chains of hashes, and stages and
links are paced. Many ranks fit on few cores, as they mostly sleep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch.job import Job
from launch.roles import seat
from pipeinfer.bench.entrants import Entrant
from pipeinfer.bench.sample import Sample, sample
from pipeinfer.bench.scene import Scene, ranges
from pipeinfer.config import Config
from pipeinfer.ports import Tally
from stages.emulated import EmulatedPair, plain_tokens

if TYPE_CHECKING:
    from launch.mpi import World


def emulate(world: World, scene: Scene, entrant: Entrant, seed: int) -> Sample | None:
    """One request on the ranks of ``world``; its tokens are checked. None on ranks other than the head."""
    request, model, policy = scene.request(seed), scene.model(seed), entrant.policy
    pair = EmulatedPair(model, scene.layer_s, scene.draft_s)
    context = len(request.prompt) + request.max_new_tokens
    config = Config(policy=policy.settings())
    plan = seat(ranges(scene.shares(policy, entrant.head_share)), drafters=int(policy.speculate))
    link = scene.link if scene.point.hardware else None  # between ranks of one host the real ones will do
    job = Job(config, plan, context, pair, world, link, "spread")  # paced stages sleep
    if not world.is_head:
        job.serve()
        return None
    tokens, emitted_at, submitted_at, tally = list[int](), list[tuple[float, int]](), None, Tally()
    for news in job.submit(request):
        submitted_at = news.at_s if submitted_at is None else submitted_at
        if news.tokens:
            tokens += news.tokens
            emitted_at.append((news.at_s, len(news.tokens)))
        tally = news.tally or tally
    job.close()
    if tokens != plain_tokens(model, request.prompt, request.max_new_tokens, frozenset()):
        raise AssertionError(f"seed {seed}, {entrant.name}: the tokens are not those of plain decoding")
    return sample(tokens, submitted_at or 0.0, emitted_at, tally, job.traffic)
