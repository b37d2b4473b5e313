"""Worlds of many requests keep every invariant, and contain what they are there for.

``python -m pipeinfer.sim.many_worlds --worlds 2000 --schedule all --processes 2`` looks at more of them.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import Run, SlotOpKind
from pipeinfer.core.ports import Command, Event, Note, Request, Sampling, Send
from pipeinfer.orchestrator.pool import Pool
from pipeinfer.sim.history import PREEMPTED, InvariantBroken, oracle
from pipeinfer.sim.many_worlds import MANY, draw_many, many_world
from pipeinfer.sim.random_worlds import check_world, draw_world, first_failures
from pipeinfer.sim.world import Checker, World, WorldSpec
from speculation.schedules import cohorts
from speculation.schedules.policy import CONTINUOUS
from speculation.schedules.trial import Trial
from stages.models.emulated import EmulatedSpec, spread
from tests.invariants.hunt import wrap

QUICK, ALL = range(8), range(11)
CHANGING = (23, 51, 55, 58, 84, 86)
"""Worlds in which passes are known while several requests are decoded, and levels are ordered."""
PREFIX = tuple(range(40))
SPEC = WorldSpec(
    seed=1,
    policy=replace(CONTINUOUS, prefill_chunk=8),
    stages=3,
    requests=(Request((*PREFIX, 1), 12), Request((*PREFIX, 2), 12), Request((*PREFIX, 3), 12, sampling=Sampling(1.0))),
    model=EmulatedSpec(layers=3, vocab=60, seed=5, ranks=spread(0.7)),
    context=60,
    max_num_seqs=3,
)


class Seen(Checker):
    """Counts what many requests do to each other."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        for command in commands:
            if isinstance(command, Note) and command.what.startswith(PREEMPTED):
                self.counts["preempted"] += 1
            elif isinstance(command, Send) and isinstance(command.message.body, Run) and address == 0:
                run = command.message.body
                sequences = {row.sequence for row in run.rows}
                self.counts["runs"] += 1
                self.counts["prompts together" if run.is_canonical else "together"] += len(sequences) > 1
                self.counts["forks"] += sum(op.kind is SlotOpKind.FORK for op in run.ops)


def seen(spec: WorldSpec) -> Counter[str]:
    """What happens in the world of ``spec``."""
    found = Seen()
    World(spec, (found,)).run()
    return found.counts


@pytest.mark.parametrize("schedule", ["", *MANY])
def test_eight_worlds_of_each_schedule_keep_every_invariant(schedule: str) -> None:
    assert not first_failures(QUICK, schedule=schedule, draw=many_world)[1]


def test_worlds_that_change_between_cohorts_and_running_ahead_keep_every_invariant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A world is too short for a trial to end, so here the way changes every few decisions, and levels always pay."""
    decided = Counter[bool]()

    def look(trial: Trial, sequences: int, rate: float, now: float) -> None:
        looks[trial] += 1
        if looks[trial] % 5 == 1:
            trial._record.in_cohorts = not trial._record.in_cohorts
        decided[trial.in_cohorts] += 1

    looks = Counter[Trial]()
    monkeypatch.setattr(Trial, "look", look)
    monkeypatch.setattr(Trial, "pause", lambda trial: None)
    monkeypatch.setattr(cohorts, "WORTH", 0.0)
    for seed in CHANGING:
        check_world(many_world(seed, "continuous"))
    assert min(decided[True], decided[False]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("schedule", MANY)
def test_more_worlds_of_each_schedule(schedule: str) -> None:
    assert not first_failures(ALL[len(QUICK) :], schedule=schedule, draw=many_world)[1]


def test_a_seed_is_a_world() -> None:
    assert many_world(7) == many_world(7)
    assert many_world(7) != many_world(8)
    assert many_world(7, "rounds").policy.schedule == "rounds"


@pytest.mark.parametrize("schedule", MANY)
def test_the_first_worlds_contain_what_they_are_there_for(schedule: str) -> None:
    found: Counter[str] = Counter()
    wanted = ("preempted", "forks", "together", "prompts together")
    for seed in range(20):
        found += seen(many_world(seed, schedule))
        if all(found[what] > 0 for what in wanted):
            return
    pytest.fail(f"only {found}")


def test_worlds_have_every_number_of_requests_at_once() -> None:
    worlds = [many_world(seed) for seed in range(200)]
    assert {world.max_num_seqs for world in worlds} >= {1, 2, 3, 4, 8, 16}
    assert any(request.priority for world in worlds for request in world.requests)
    assert any(world.tp > 1 for world in worlds) and any(world.aborts for world in worlds)
    mixed = [len({request.sampling.repetition_penalty for request in world.requests}) > 1 for world in worlds]
    assert sum(mixed) > 20


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("schedule", MANY)
def test_company_changes_time_and_never_tokens(seed: int, schedule: str) -> None:
    world = replace(many_world(seed, schedule), aborts=(), closes_s=None, arrivals=(), at_once=True)
    for most, kv_slots in ((1, None), (2, None), (16, None), (16, world.context)):
        answers = World(replace(world, max_num_seqs=most, kv_slots=kv_slots)).run()
        for answer, request in zip(answers, world.requests, strict=True):
            assert tuple(answer.tokens) == oracle(world.model, request), (most, kv_slots, answer.number)


def test_prefixes_are_shared_with_a_request_that_is_decoded_and_with_one_that_has_ended() -> None:
    kept = replace(SPEC, keeps_prefixes=True)
    for spec in (replace(kept, arrivals=(0.0, 40.0, 40.0)), replace(kept, arrivals=(0.0, 400.0, 400.0))):
        check_world(spec)
        assert seen(spec)["forks"] == 2
    check_world(replace(SPEC, at_once=True))
    assert seen(replace(SPEC, at_once=True))["forks"] == 0


def test_requests_begin_again_where_slots_are_few() -> None:
    few = replace(SPEC, at_once=True, kv_slots=60, guess_slots=1, requests=tuple(
        Request((number,), 50, sampling=Sampling(1.0, seed=number)) for number in range(3)))  # fmt: skip
    check_world(few)
    assert seen(few)["preempted"] > 0


def test_what_was_given_up_in_its_prompt_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages may have skipped some of it."""
    spec = replace(SPEC, keeps_prefixes=True, arrivals=(0.0, 60.0), requests=SPEC.requests[:2], aborts=((4.0, 0),))
    check_world(spec)
    wrap(monkeypatch, Pool, "end", lambda original, pool, session, is_whole: original(pool, session, True))
    with pytest.raises((InvariantBroken, RemoteProtocolError)):
        check_world(spec)


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.sampled_from(MANY))
def test_any_world(seed: int, schedule: str) -> None:
    rng = random.Random(seed)
    spec = draw_many(rng, draw_world(rng, seed, schedule))
    note(repr(spec))
    check_world(spec)


@pytest.mark.parametrize("seed", [204487, 320717])
def test_a_restart_that_drafters_hear_of_later_may_discard_the_tree(seed: int) -> None:
    """The governor wants no guesses when the first world's policy, without reuse, cancels those in flight; in the other
    world the same emission is no restart, and they are kept."""
    world = many_world(seed, "continuous")
    assert not world.policy.reuse
    check_world(world)
