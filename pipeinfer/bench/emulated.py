"""Suites emulated over MPI: ranks, messages, machines and tokens are real; models are chains of hashes, and stages and
links are paced. Many ranks fit on few cores, as they mostly sleep. The ranks of a group are one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch.collector import frozen
from launch.head import LocalJob
from launch.job import Job
from pipeinfer.bench.contenders import Contender
from pipeinfer.bench.sample import Sample, sample
from pipeinfer.bench.scenario import LATE, Scenario
from pipeinfer.core.config import Config
from pipeinfer.core.ports import RequestStats
from pipeinfer.placement.roles import place, split_layers
from stages.models.emulated import EmulatedPair, EmulatedShard, plain_tokens
from stages.models.emulated_group import EmulatedGroup

if TYPE_CHECKING:
    from launch.mpi import World


def emulate(world: World, scenario: Scenario, contender: Contender, seed: int) -> Sample | None:
    """One request on the ranks of ``world``; its tokens are checked. None on ranks other than the head."""
    request, model, policy = scenario.request(seed), scenario.model(seed), contender.policy
    tp = scenario.point.tp
    make_stage = EmulatedGroup(tp, LATE, seed << 8 ^ world.rank).shard if tp > 1 else EmulatedShard
    pair = EmulatedPair(model, scenario.layer_s, scenario.draft_s, make_stage)
    context = len(request.prompt) + request.max_new_tokens
    config = Config(policy=policy.settings())
    shares = split_layers(model.layers, scenario.shares(policy, contender.head_share))
    plan = place(shares, int(policy.speculate), is_rank_0_shared=scenario.is_rank_0_shared(policy))
    link = scenario.link if scenario.point.hardware else None  # between ranks of one host the real ones will do
    job = Job(config, plan, context, pair, world, link, "spread")  # paced stages sleep
    if not world.is_head:
        job.serve()
        return None
    with frozen():
        head = LocalJob(job, is_threaded=False)
        submitted, *told = head.decode(request)
        head.close()
    tokens = [token for output in told for token in output.tokens]
    emitted_at = [(output.at_s, len(output.tokens)) for output in told if output.tokens]
    if tokens != plain_tokens(model, request.prompt, request.max_new_tokens, frozenset()):
        raise AssertionError(f"seed {seed}, {contender.name}: the tokens are not those of plain decoding")
    return sample(tokens, submitted.at_s, emitted_at, told[-1].stats or RequestStats(), job.traffic)
