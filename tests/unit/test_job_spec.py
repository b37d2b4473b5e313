"""Machines from numbers: the same ones everywhere."""

from __future__ import annotations

import json

import pytest

from pipeinfer.core.messages import Hello
from pipeinfer.core.ports import Send, Started
from pipeinfer.orchestrator.machine import Orchestrator
from pipeinfer.runtime.job_spec import JobSpec
from speculation.drafter.machine import Drafter
from speculation.schedules.policy import CONTINUOUS, PLAIN, Policy
from stages.stage.machine import Stage

SPEC = JobSpec(2, 2, CONTINUOUS, 64, digest=7)


def test_every_role_has_a_machine() -> None:
    kinds = [type(SPEC.machine(address)) for address in SPEC.addresses]
    assert kinds == [Orchestrator, Stage, Stage, Drafter, Drafter]
    assert [SPEC.machine(address).address for address in SPEC.addresses] == [0, 1, 2, 0x8000, 0x8001]


def test_numbers_make_the_same_cast() -> None:
    for job_spec in (SPEC, JobSpec(1, 0, PLAIN, 8, guess_slots=3, placement="alone")):
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
    assert JobSpec(2, 1, policy, 64, overlap=True).slots == (128, 12), "two requests may hold accepted tokens"
    assert JobSpec(2, 0, PLAIN, 64).slots == (64, 0)
    assert JobSpec(2, 1, policy, 64).window == 3
