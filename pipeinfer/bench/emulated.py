"""Suites emulated over MPI: ranks, messages, machines and tokens are real; models are chains of hashes, and stages and
links are paced. Many ranks fit on few cores, as they mostly sleep. The ranks of a group are one process."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from launch.collector import frozen
from launch.head import LocalJob
from launch.job import Job
from launch.requests import RequestOutput
from pipeinfer.bench.contenders import Contender
from pipeinfer.bench.load import Load, load_of, load_sample
from pipeinfer.bench.sample import Sample
from pipeinfer.bench.scenario import LATE, Scenario
from pipeinfer.core.config import Config
from pipeinfer.placement.roles import place, split_layers
from pipeinfer.sim.world import Answer
from stages.models.emulated import EmulatedPair, EmulatedShard
from stages.models.emulated_group import EmulatedGroup

if TYPE_CHECKING:
    from launch.mpi import World


def emulate(world: World, scenario: Scenario, contender: Contender, seed: int) -> Sample | None:
    """All requests of a sample on the ranks of ``world``; see load_sample for what is checked. None on ranks other than
    the head."""
    load, policy, tp = load_of(scenario, seed), contender.policy, scenario.point.tp
    make_stage = EmulatedGroup(tp, LATE, seed << 8 ^ world.rank).shard if tp > 1 else EmulatedShard
    pair = EmulatedPair(scenario.model(seed), scenario.layer_s, scenario.draft_s, make_stage)
    context = scenario.prompt_tokens + scenario.point.tokens
    config = Config(policy=policy.settings(), max_num_seqs=load.max_num_seqs)
    shares = split_layers(scenario.layers, scenario.shares(policy, contender.head_share))
    plan = place(shares, int(policy.speculate), is_rank_0_shared=scenario.is_rank_0_shared(policy))
    link = scenario.link if scenario.point.hardware else None  # between ranks of one host the real ones will do
    job = Job(config, plan, context, pair, world, link, "spread")  # paced stages sleep
    if not world.is_head:
        job.serve()
        return None
    with frozen():
        head = LocalJob(job, is_threaded=False)
        answers = decode(head, load)
        head.close()
    return load_sample(scenario, contender.name, seed, answers, job.traffic)


def decode(head: LocalJob, load: Load) -> list[Answer]:
    """The answers to all requests of ``load``, each submitted when it comes."""
    answers = [Answer(number) for number in range(len(load.requests))]
    began, changed = time.monotonic(), threading.Condition()
    with changed:
        for answer, request in zip(answers, load.requests, strict=True):
            if load.arrivals:
                head.wait(changed, lambda: False, began + load.arrivals[answer.number] - time.monotonic())
            head.submit(request, partial(take, answer))
        head.wait(changed, lambda: all(answer.stats is not None for answer in answers))
    return answers


def take(answer: Answer, output: RequestOutput) -> None:
    """Add ``output`` to ``answer``."""
    if not answer.submitted_at:
        answer.submitted_at = output.at_s
    if output.tokens:
        answer.tokens += output.tokens
        answer.emitted_at.append((output.at_s, len(output.tokens)))
    answer.stats = output.stats
