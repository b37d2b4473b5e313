"""L9 through files: what a world's hosts wrote down replays to the same commands, and what differs is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import Message, Result
from pipeinfer.core.ports import Event, Note, Received, Request, Sampling
from pipeinfer.orchestrator.machine import Orchestrator
from pipeinfer.runtime.job_spec import JobSpec
from pipeinfer.runtime.replay import Retold, retell
from pipeinfer.runtime.trace import Trace
from pipeinfer.sim.many_worlds import MANY, many_world
from pipeinfer.sim.random_worlds import random_world
from pipeinfer.sim.world import WorldSpec
from speculation.schedules.policy import CONTINUOUS
from stages.models.emulated import EmulatedSpec, spread
from stages.stage.machine import Stage
from tests.cli.run import ROOT
from tests.invariants.hunt import wrap
from tests.invariants.traced import trace_world

SAMPLING = Sampling(0.75, repetition_penalty=1.5, seed=2**63 + 1)
BUSY = WorldSpec(
    seed=3,
    policy=CONTINUOUS,
    stages=3,
    requests=(Request(tuple(range(30)), 40), Request((3, 1, 4), 80, frozenset({5}), SAMPLING)),
    model=EmulatedSpec(layers=6, vocab=40, seed=2, ranks=spread(0.7)),
    drafters=2,
)


def replayed(path: Path) -> Retold:
    trace = Trace(path)
    job_spec = JobSpec.of(trace.header.job_spec)
    return retell({address: job_spec.machine(address) for address in trace.header.roles}, trace.steps())


@pytest.mark.parametrize("schedule", ["plain", "rounds", "pipeinfer", "continuous"])
@pytest.mark.parametrize("seed", range(8))
def test_worlds_replay_from_files(seed: int, schedule: str, tmp_path: Path) -> None:
    must_replay(trace_world(random_world(seed, schedule), tmp_path / "world"))


@pytest.mark.parametrize("schedule", MANY)
@pytest.mark.parametrize("seed", range(2))
def test_worlds_of_many_requests_replay_from_files(seed: int, schedule: str, tmp_path: Path) -> None:
    must_replay(trace_world(many_world(seed, schedule), tmp_path / "world"))


def must_replay(paths: list[Path]) -> None:
    for path in paths:
        trace = Trace(path)
        retold = replayed(path)
        assert retold.difference == ""
        assert retold.events == len(list(trace.steps())) > 0
        assert retold.ended == set(trace.header.roles)


def test_the_governor_s_decisions_are_in_the_trace(tmp_path: Path) -> None:
    dear = replace(BUSY, row_cost=1.0, requests=(Request((1, 2, 3), 150),))  # narrower runs are worth a try
    head, *others = trace_world(dear, tmp_path / "world")
    assert len(others) == 4, "the first drafter is beside the orchestrator"
    assert any(isinstance(command, Note) for step in Trace(head).steps() for command in step.commands)
    assert [replayed(path).difference for path in (head, *others)] == [""] * 5


@pytest.mark.parametrize("number", [1, 20, 60])
def test_a_difference_in_any_number_is_found_where_it_is(number: int, tmp_path: Path) -> None:
    """Each number that a role commanded is changed in turn; the replay names the event and the way to it."""
    path = trace_world(BUSY, tmp_path / "world")[1]
    lines = path.read_text().splitlines()
    while not (places := list(numbers(json.loads(lines[number])[3]))):
        number += 1  # nothing was commanded there
    for place in places:
        words = json.loads(lines[number])
        owner: Any = words[3]
        for step in place[:-1]:
            owner = owner[step]
        owner[place[-1]] = not owner[place[-1]] if isinstance(owner[place[-1]], bool) else owner[place[-1]] + 1
        changed = [*lines[:number], json.dumps(words), *lines[number + 1 :]]
        path.write_text("\n".join(changed) + "\n")
        retold = replayed(path)
        if not retold.difference:  # there is no such kind or operation
            trace = Trace(path)
            assert len(list(trace.steps())) == retold.events == number - 1
            assert trace.damage.startswith(f"line {number + 1} is damaged")
            continue
        assert f"answers event {number} (" in retold.difference
        assert f"commands.{place[0]}" in retold.difference


def numbers(words: Any, path: tuple[int, ...] = ()) -> Any:
    """The places of all numbers in ``words``."""
    if isinstance(words, int | float):
        yield path
    elif isinstance(words, list):
        for index, word in enumerate(words):
            yield from numbers(word, (*path, index))


def test_a_machine_that_has_changed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = trace_world(BUSY, tmp_path / "world")
    wrap(monkeypatch, Stage, "_credit", lambda original, stage: original(stage) if stage._now < 20 else [])
    differences = [replayed(path).difference for path in paths]
    assert "stage 0 answers event" in differences[1]
    assert "Credit" in differences[1]
    assert not any(differences[2:])


def test_a_trace_replays_on_another_processor(tmp_path: Path) -> None:
    """Without this one's newest instructions numpy's exponentials and sums have other last bits."""
    paths = trace_world(replace(BUSY, policy=replace(CONTINUOUS, topk=4, draft_batch=4)), tmp_path / "world")
    assert "Calibrate(" in "".join(str(step.event) for step in Trace(paths[4]).steps())
    line = [sys.executable, "-m", "pipeinfer", "replay", *map(str, paths)]
    older = {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512F AVX512_SKX", "OPENBLAS_CORETYPE": "Haswell"}
    done = subprocess.run(line, cwd=ROOT, env=os.environ | older, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_role_that_raised_raises_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last line of a crashed rank is the event that it crashed on, and the crash is the same at home."""

    def overlook(original: Any, machine: Orchestrator, event: Event, now: float) -> Any:
        if isinstance(event, Received) and isinstance(event.message.body, Result) and now > 5:
            event = Received(Message(3, 0, Result(1), txn=10**6))
        return original(machine, event, now)

    with monkeypatch.context() as patch:
        wrap(patch, Orchestrator, "handle", overlook)
        with pytest.raises(RemoteProtocolError):
            trace_world(BUSY, tmp_path / "world")
        crashed = sorted(tmp_path.iterdir())[0]
        assert "expected transaction" in crashed.read_text().splitlines()[-1]
        assert replayed(crashed).difference == ""
    retold = replayed(crashed)
    assert "raised RemoteProtocolError: orchestrator expected transaction" in retold.difference
