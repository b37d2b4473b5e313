"""Whole jobs with the emulated pair on the ranks that mpiexec gave us: real messages, and tokens that have an
oracle."""

from __future__ import annotations

import gc

import pytest

from launch.head import LocalJob
from launch.job import Job
from launch.mpi import World
from pipeinfer.core.config import Config
from pipeinfer.core.ports import Request
from pipeinfer.placement.roles import assign
from speculation.schedules.policy import CONTINUOUS, PLAIN, Policy
from stages.models.emulated import EmulatedPair, EmulatedSpec, plain_tokens, spread

pytestmark = pytest.mark.mpi(min_size=2)

RELAY = Policy("continuous", max_rows=6, topk=3, draft_batch=3, max_ahead=24, cancel="relay", prefill_chunk=5)


def decode(
    policy: Policy,
    spec: EmulatedSpec,
    requests: list[Request],
    layer_s: float = 0.0,
    is_threaded: bool = True,
    timeout_s: float = 0.0,
) -> list[list[int]]:
    """Every request's tokens, on the head; on the other ranks nothing."""
    world = World()
    pair = EmulatedPair(spec, lambda rows, context: layer_s, lambda rows, context: layer_s)
    plan = assign(world.size, spec.layers, policy.speculate)
    job = Job(Config(policy=policy.settings(), timeout_s=timeout_s), plan, 256, pair, world)
    assert not gc.get_freeze_count(), "the collector is the program's own"
    answers: list[list[int]] = []
    if world.is_head:
        head = LocalJob(job, is_threaded)
        answers = [[token for output in head.decode(request) for token in output.tokens] for request in requests]
        head.close()
    else:
        job.serve()
    world.close()
    return answers


@pytest.mark.parametrize("policy", [PLAIN, CONTINUOUS, RELAY], ids=["plain", "continuous", "relay"])
@pytest.mark.parametrize("acceptance", [0.0, 0.7, 1.0])
def test_tokens_are_those_of_plain_decoding(policy: Policy, acceptance: float) -> None:
    spec = EmulatedSpec(layers=8, vocab=50, seed=3, ranks=spread(acceptance) if acceptance else (0.0,))
    requests = [
        Request((1, 2, 3), 40),
        Request(tuple(range(40)), 30, frozenset({7})),
        Request((5,), 1),
    ]
    for request, answer in zip(requests, decode(policy, spec, requests), strict=False):
        assert answer == plain_tokens(spec, request.prompt, request.max_new_tokens, request.stop_tokens)


def test_where_mpi_grants_one_thread_only_the_caller_s_drives() -> None:
    spec = EmulatedSpec(layers=8, vocab=50, seed=5)
    request = Request((1, 2, 3), 24)
    for answer in decode(CONTINUOUS, spec, [request, request], is_threaded=False):
        assert answer == plain_tokens(spec, request.prompt, request.max_new_tokens, request.stop_tokens)


def test_a_layer_that_takes_longer_than_the_job_waits_is_no_stall() -> None:
    spec = EmulatedSpec(layers=World().size, vocab=50, seed=6)
    request = Request((1, 2, 3), 1)
    for answer in decode(PLAIN, spec, [request], layer_s=1.0, timeout_s=0.7):
        assert answer == plain_tokens(spec, request.prompt, request.max_new_tokens, request.stop_tokens)


def test_paced_stages_are_cancelled_early_and_stay_exact() -> None:
    spec = EmulatedSpec(layers=8, vocab=50, seed=4, ranks=(0.5,), claims=(0.9,))
    request = Request((1, 2, 3), 24)
    for answer in decode(CONTINUOUS, spec, [request], layer_s=1e-3):
        assert answer == plain_tokens(spec, request.prompt, request.max_new_tokens, request.stop_tokens)
