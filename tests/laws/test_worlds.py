"""Random worlds keep every law: the same ones each time, and whatever Hypothesis thinks of."""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from pipeinfer.sim.random_worlds import check_world, draw_world, first_failures, main, random_world
from pipeinfer.sim.world import World
from tests.laws.hunt import WORLDS

PROCESSES = 2


def failures(seeds: range) -> list[str]:
    return first_failures(seeds)[1]


def test_the_worlds_of_the_mutants_keep_every_law() -> None:
    assert not failures(WORLDS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_worlds() -> None:
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        found = pool.map(failures, [range(start, start + 100) for start in range(0, 2000, 100)])
        assert not [line for lines in found for line in lines]


@given(st.randoms(use_true_random=False), st.integers(0, 0xFFFF))
def test_any_world(rng: random.Random, seed: int) -> None:
    spec = draw_world(rng, seed)
    note(repr(spec))
    check_world(spec)


@pytest.mark.parametrize("seed", range(12))
def test_advice_changes_time_and_never_tokens(seed: int) -> None:
    spec = random_world(seed)
    variants = [replace(spec, policy=replace(spec.policy, cancel=cancel)) for cancel in ("direct", "relay", "off")]
    variants.append(replace(variants[0], link=replace(spec.link, control_loss=1.0)))
    variants.append(replace(variants[1], link=replace(spec.link, control_loss=0.5, control_repeat=0.5, jitter_s=2.0)))
    told = [[answer.tokens for answer in World(variant).run()] for variant in variants]
    assert all(tokens == told[0] for tokens in told)


def test_a_seed_is_a_world() -> None:
    assert random_world(7) == random_world(7)
    assert random_world(7) != random_world(8)


def test_the_command_line_tells_the_seed_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--worlds", "2", "--seed", "3"]) == 0
    assert "2 worlds kept every law" in capsys.readouterr().out
    monkeypatch.setattr("pipeinfer.orchestrator.accept", lambda *arguments: 1 / 0)
    assert main(["--worlds", "2", "--seed", "3"]) == 1
    assert "--worlds 1 --seed 3" in capsys.readouterr().out
