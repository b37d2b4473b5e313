"""Random worlds keep every law: the same ones each time, and whatever Hypothesis thinks of."""

from __future__ import annotations

import os
import random
import time
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


def check(seeds: range) -> tuple[int, list[str]]:
    """Events in the worlds of ``seeds``, and a line for each of the first that broke a law."""
    reports, failures = first_failures(seeds)
    return sum(report.events for report in reports), failures


def test_the_worlds_of_the_mutants_keep_every_law() -> None:
    assert not check(WORLDS)[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_worlds(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        found = list(pool.map(check, [range(start, start + 100) for start in range(0, 2000, 100)]))
    wall_s, events = time.perf_counter() - began, sum(events for events, _ in found)
    with capsys.disabled():
        rate = events / wall_s
        print(f"\n2,000 worlds: {events} events in {wall_s:.0f} s on {PROCESSES} processes, {rate:.0f} events/s")
    assert not [line for _, lines in found for line in lines]
    assert wall_s < 120 or os.getloadavg()[0] > 2 * PROCESSES, "two thousand worlds take less than two minutes"


@given(st.randoms(use_true_random=False), st.integers(0, 0xFFFF))
def test_any_world(rng: random.Random, seed: int) -> None:
    spec = draw_world(rng, seed)
    note(repr(spec))
    check_world(spec)


@pytest.mark.parametrize("seed", range(12))
def test_advice_changes_time_and_never_tokens(seed: int) -> None:
    spec = replace(random_world(seed), withdraw_s=None)  # else time decides how many tokens there are
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
