"""Random worlds keep every invariant: the same ones each time, and whatever Hypothesis thinks of.

``python -m pipeinfer.sim.random_worlds --worlds 2000 --schedule all --processes 2`` looks at more of them.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from pipeinfer.core.ports import Command, Event
from pipeinfer.sim.many_worlds import MANY, many_world
from pipeinfer.sim.random_worlds import (
    SCHEDULES,
    check_world,
    draw_groups,
    draw_world,
    first_failures,
    main,
    random_world,
    survey,
)
from pipeinfer.sim.world import Checker, World
from stages.stage.machine import Stage
from tests.invariants.mutants import MUTANTS

QUICK, ALL = range(25), range(40)
"""Worlds of each schedule; the mutants are caught in the first of them, and so these must keep every invariant. More:
``python -m pipeinfer.sim.random_worlds --worlds 2000 --schedule all``."""


@pytest.mark.parametrize("schedule", sorted({mutant.schedule for mutant in MUTANTS if not mutant.many}))
def test_the_worlds_of_the_mutants_keep_every_invariant(schedule: str) -> None:
    assert not first_failures(QUICK, schedule=schedule)[1]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["", *SCHEDULES])
def test_more_worlds_of_each_schedule(schedule: str) -> None:
    assert not first_failures(ALL[len(QUICK) :], schedule=schedule)[1]


@settings(max_examples=40)
@given(st.randoms(use_true_random=False), st.integers(0, 0xFFFF), st.sampled_from(("", *SCHEDULES)))
def test_any_world(rng: random.Random, seed: int, schedule: str) -> None:
    spec = draw_groups(rng, draw_world(rng, seed, schedule))
    note(repr(spec))
    check_world(spec)


@pytest.mark.parametrize("schedule", ["pipeinfer", "continuous"])  # the others have nothing to cancel before the end
@pytest.mark.parametrize("seed", range(2))
def test_advice_changes_time_and_never_tokens(seed: int, schedule: str) -> None:
    # Where a user ends requests, time decides how many tokens there are.
    spec = replace(random_world(seed, schedule), aborts=(), closes_s=None)
    variants = [replace(spec, policy=replace(spec.policy, cancel=cancel)) for cancel in ("direct", "relay", "off")]
    variants.append(replace(variants[0], link=replace(spec.link, control_loss=1.0)))
    variants.append(replace(variants[1], link=replace(spec.link, control_loss=0.5, control_repeat=0.5, jitter_s=2.0)))
    variants += [replace(one, policy=replace(one.policy, cancel_rows=not spec.policy.cancel_rows)) for one in variants]
    told = [[answer.tokens for answer in World(variant).run()] for variant in variants]
    assert all(tokens == told[0] for tokens in told)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(3))
def test_penalties_of_what_was_generated_and_biases_keep_every_invariant(seed: int, schedule: str) -> None:
    spec, dice = random_world(seed, schedule), random.Random(seed)
    requests = []
    for request in spec.requests:
        penalties = dice.choice(((0.5, 0.0), (0.0, 0.25), (-1.0, 0.5)))
        biases = ((0, 1.0), (5, -2.0)) if dice.random() < 0.5 else ()
        changed = dict(zip(("presence_penalty", "frequency_penalty"), penalties, strict=True))
        sampling = replace(request.sampling, **changed, logit_bias=biases, top_logprobs=dice.randint(0, 3))
        requests.append(replace(request, sampling=sampling))
    check_world(replace(spec, requests=tuple(requests)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(3))
def test_log_probabilities_of_prompts_keep_every_invariant(seed: int, schedule: str) -> None:
    """Of all prompts; every second request wants nothing else."""
    spec, requests = random_world(seed, schedule), []
    for index, request in enumerate(spec.requests):
        sampling = replace(request.sampling, prompt_logprobs=3 * (seed % 2))
        requests.append(replace(request, sampling=sampling, max_new_tokens=index % 2 * request.max_new_tokens))
    check_world(replace(spec, requests=tuple(requests), keeps_prefixes=True))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(2))
def test_groups_change_time_and_never_tokens(seed: int, schedule: str) -> None:
    alone = replace(random_world(seed, schedule), aborts=(), closes_s=None, tp=1, late=0.0, exchange_s=0.0)
    found = [World(replace(alone, tp=tp)).run() for tp in (1, 2, 3, 8)]
    for answers in found[1:]:
        assert [answer.emitted_at for answer in answers] == [answer.emitted_at for answer in found[0]], "nobody is late"
    found += [World(replace(alone, tp=tp, late=1.0, exchange_s=0.1)).run() for tp in (2, 4)]
    for answers in found[1:]:
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in found[0]]


@pytest.mark.parametrize("schedule", MANY)
def test_two_sequences_live_in_the_shards_of_some_worlds(schedule: str) -> None:
    """Two requests are decoded at once."""

    class Living(Checker):
        most = 0

        def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
            machine = world.machine(address)
            if isinstance(machine, Stage):
                self.most = max(self.most, len(machine._table._sequences))

    living = Living()
    for seed in range(40):
        World(replace(random_world(seed, schedule), max_num_seqs=2, at_once=True), (living,)).run()
        if living.most >= 2 and seed >= 5:
            break
    assert living.most == 2


def test_groups_are_drawn_after_all_else() -> None:
    """Worlds without groups stay what they were, and groups share drafts as well as stages in some of the others."""
    worlds = [random_world(seed) for seed in range(200)]
    grouped = [world for world in worlds if world.tp > 1]
    assert 30 < len(grouped) < 70
    assert any(world.placement == "alone" and world.drafters and world.policy.speculate for world in grouped)
    assert all((world.late, world.exchange_s) == (0.0, 0.0) for world in worlds if world.tp == 1)


def test_a_seed_is_a_world() -> None:
    assert random_world(7) == random_world(7)
    assert random_world(7) != random_world(8)
    assert [random_world(7, schedule).policy.schedule for schedule in SCHEDULES[1:]] == list(SCHEDULES[1:])


def test_the_command_line_tells_the_seed_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--worlds", "2", "--seed", "3"]) == 0
    assert "mixed: 2 worlds kept every invariant" in capsys.readouterr().out
    monkeypatch.setattr("pipeinfer.orchestrator.machine.accept", lambda *arguments: 1 / 0)
    assert main(["--worlds", "2", "--seed", "3", "--schedule", "rounds"]) == 1
    assert "--worlds 1 --seed 3 --schedule rounds" in capsys.readouterr().out
    assert main(["--worlds", "1", "--seed", "3", "--schedule", "rounds"], many_world, MANY) == 1
    assert "pipeinfer.sim.many_worlds --worlds 1 --seed 3 --schedule rounds" in capsys.readouterr().out


def test_the_command_line_takes_every_schedule_in_turn(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--worlds", "1", "--schedule", "all"]) == 0
    told = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert told == list(SCHEDULES)
    assert main(["--worlds", "1", "--schedule", "all"], many_world, MANY) == 0
    assert {line.split(":")[0] for line in capsys.readouterr().out.splitlines()} == set(MANY)


@pytest.mark.slow
def test_worlds_are_the_same_on_two_processes() -> None:
    alone, shared = (survey(range(10), "rounds", processes) for processes in (1, 2))
    assert (alone.worlds, alone.events, alone.tokens) == (shared.worlds, shared.events, shared.tokens)
