"""Machines from numbers: the same ones everywhere."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipeinfer.core.addresses import FIRST_STAGE, ORCHESTRATOR
from pipeinfer.core.messages import Hello
from pipeinfer.core.ports import Send, Started
from pipeinfer.orchestrator.machine import Orchestrator
from pipeinfer.runtime.job_spec import MOST_SHARES, JobSpec
from speculation.drafter.machine import Drafter
from speculation.schedules.policy import CONTINUOUS, PLAIN, Policy
from stages.stage.machine import Stage

SPEC = JobSpec(2, 2, CONTINUOUS, 64, digest=7)


def test_every_role_has_a_machine() -> None:
    kinds = [type(SPEC.machine(address)) for address in SPEC.addresses]
    assert kinds == [Orchestrator, Stage, Stage, Drafter, Drafter]
    assert [SPEC.machine(address).address for address in SPEC.addresses] == [0, 1, 2, 0x8000, 0x8001]


def test_numbers_make_the_same_cast() -> None:
    many = JobSpec(1, 0, PLAIN, 8, max_num_seqs=5, kv_slots=20, keeps_prefixes=True)
    for job_spec in (SPEC, many, JobSpec(1, 0, PLAIN, 8, guess_slots=3, placement="alone")):
        assert JobSpec.of(json.loads(json.dumps(job_spec.numbers()))) == job_spec


@pytest.mark.parametrize(
    "change",
    [
        {"more": 1},
        {"policy": {"name": "some", "more": 1}},
        {"policy": {"name": "some", "max_rows": 0}},
        {"placement": "odd"},
    ],
)
def test_what_is_no_cast(change: dict[str, object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        JobSpec.of(SPEC.numbers() | change)


def test_the_digest_is_everybody_s() -> None:
    for address in SPEC.addresses[1:]:
        (hello,) = SPEC.machine(address).handle(Started(), 0.0)
        assert isinstance(hello, Send)
        assert type(hello.message.body) is Hello
        assert hello.message.body == Hello(7)


def test_slots() -> None:
    policy = Policy("some", max_rows=4, window=3)
    assert JobSpec(2, 1, policy, 64).slots == (64, 12)
    assert JobSpec(2, 1, policy, 64, guess_slots=5).slots == (64, 5)
    assert JobSpec(2, 1, policy, 64, guess_slots=50).slots == (64, 12)
    assert JobSpec(2, 0, PLAIN, 64).slots == (64, 0)
    assert JobSpec(2, 1, policy, 64).window == 3


def test_slots_of_several_requests() -> None:
    policy = Policy("some", max_rows=4, window=3)
    two, many = JobSpec(2, 1, policy, 64, max_num_seqs=2), JobSpec(2, 1, policy, 64, max_num_seqs=MOST_SHARES + 1)
    assert two.slots == (128, 24), "each may hold a whole context, and the guesses of one that is alone"
    assert many.slots == ((MOST_SHARES + 1) * 64, MOST_SHARES * 12)
    assert replace(many, guess_slots=5).slots[1] == 5
    assert replace(two, kv_slots=100).slots == (100, 24)
    assert replace(two, kv_slots=10).slots == (64, 24), "one request has its whole context at least"


def test_the_orchestrator_and_the_stages_have_the_same_slots() -> None:
    spec = JobSpec(2, 1, CONTINUOUS, 64, max_num_seqs=3, kv_slots=100, keeps_prefixes=True)
    head, stage = spec.machine(ORCHESTRATOR), spec.machine(FIRST_STAGE)
    assert isinstance(head, Orchestrator) and isinstance(stage, Stage)
    assert head._allocator.capacity == sum(spec.slots)
    assert head._allocator.speculative == spec.slots[1]
    assert stage._table.capacity == sum(spec.slots)
