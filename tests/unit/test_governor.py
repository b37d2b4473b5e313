"""The governor ends where a token is cheapest."""

from __future__ import annotations

import random

import pytest

from speculation.schedules.governor import HYSTERESIS, SMALL_STAKE, SPELL_TOKENS, STAKE, Gear, Governor

TRIP_S = 8.0


def drive(
    governor: Governor,
    cost_s: dict[int, float],
    tokens: int,
    rng: random.Random,
    row_cost: float = 0.0,
    now: float = 0.0,
) -> tuple[float, dict[int, int], list[str]]:
    """Commit ``tokens`` at ``cost_s`` seconds a token in each gear, with a tenth of noise; returns when that was, how
    many tokens fell into each gear, and the notes."""
    spent: dict[int, int] = dict.fromkeys(cost_s, 0)
    notes = []
    for index in range(tokens):
        rows = governor.gear.rows
        now += cost_s[rows] * rng.uniform(0.9, 1.1)
        spent[rows] += 1
        sent = max(1, rows if index % 3 else 1)
        governor.returned(sent, 1.0 + row_cost * (sent - 1), TRIP_S * (1.0 + row_cost * (sent - 1)), index % 2 == 0)
        if note := governor.accepted(1, now):
            notes.append(note)
    return now, spent, notes


@pytest.mark.parametrize("best", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_it_ends_where_a_token_is_cheapest(best: int, seed: int) -> None:
    governor = Governor(8)
    gears = [gear.rows for gear in governor.gears]
    assert gears == [0, 1, 2, 4, 8]
    place = gears.index(best)
    cost_s = {rows: TRIP_S * (1.0 + 0.25 * abs(index - place)) for index, rows in enumerate(gears)}
    if best:
        cost_s = {rows: seconds / 2 for rows, seconds in cost_s.items()} | {0: TRIP_S}
    rng = random.Random(seed)
    now, _, _ = drive(governor, cost_s, 60 * SPELL_TOKENS, rng, row_cost=0.2)
    _, spent, notes = drive(governor, cost_s, 60 * SPELL_TOKENS, rng, row_cost=0.2, now=now)
    assert spent[best] > 0.7 * 60 * SPELL_TOKENS, (seed, spent, notes)


def test_where_rows_are_free_and_guesses_good_nothing_else_is_tried() -> None:
    governor = Governor(8)
    cost_s = {0: 8.0, 1: 4.0, 2: 3.0, 4: 2.0, 8: 1.8}
    _, spent, notes = drive(governor, cost_s, 100 * SPELL_TOKENS, random.Random(1))
    assert notes == []
    assert spent[0] == spent[1] == spent[2] == 0


def test_it_comes_back_from_plain_decoding_when_guesses_are_good_again() -> None:
    governor, rng = Governor(4), random.Random(2)
    bad = {0: TRIP_S, 1: 1.3 * TRIP_S, 2: 1.4 * TRIP_S, 4: 1.6 * TRIP_S}
    now, spent, _ = drive(governor, bad, 60 * SPELL_TOKENS, rng, row_cost=0.1)
    assert governor.gear.rows == 0
    assert spent[0] > 0.7 * 60 * SPELL_TOKENS
    good = {0: TRIP_S, 1: 0.5 * TRIP_S, 2: 0.4 * TRIP_S, 4: 0.3 * TRIP_S}
    _, spent, notes = drive(governor, good, 100 * SPELL_TOKENS, rng, row_cost=0.1, now=now)
    assert governor.gear.rows > 0, notes
    assert spent[0] < 0.8 * 100 * SPELL_TOKENS


def test_a_bad_probe_is_given_up_after_a_few_tokens() -> None:
    governor = Governor(8)
    cost_s = {0: 8.0, 1: 8.0, 2: 8.0, 4: 8.0, 8: 2.0}
    _, spent, notes = drive(governor, cost_s, 20 * SPELL_TOKENS, random.Random(4), row_cost=0.2)
    probes = sum("not better" in note for note in notes)
    assert probes > 1
    lost = sum(spent[rows] for rows in (1, 2, 4))  # at four times home's cost, and a trip of four more in each probe
    assert lost <= probes * (STAKE / 3 + 2 + TRIP_S / 2.0), (lost, notes)


def test_a_gear_is_not_probed_in_hope_alone() -> None:
    governor, now = Governor(8), 0.0
    for _ in range(20 * SPELL_TOKENS):
        now += 2.0
        governor.returned(8, 1.0, TRIP_S, carries_root=False)
        assert governor.accepted(1, now) == ""
    assert governor.curve.growth(8, 1) > 1.5, "one row looks quick, but nobody has seen one"


def test_noise_within_the_hysteresis_moves_nothing() -> None:
    governor = Governor(2)
    cost_s = {0: TRIP_S, 1: 4.0, 2: 4.0 * (1 - HYSTERESIS / 2)}
    _, _, notes = drive(governor, cost_s, 200 * SPELL_TOKENS, random.Random(3), row_cost=1.0)
    shifts = [note for note in notes if "instead of" in note]
    assert len(shifts) <= 1, notes


def test_a_request_s_prompt_counts_for_nobody() -> None:
    governor = Governor(2)
    governor.accepted(1, 1.0)
    governor.accepted(1, 100.0)
    governor.opened()
    assert governor.accepted(1, 5000.0) == ""
    assert governor._since is None or governor._since >= 5000.0


@pytest.mark.parametrize("many_s", [0.5, 0.8, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_where_ranks_share_cores_many_runs_must_be_clearly_better_than_one(many_s: float, seed: int) -> None:
    """Half the time a token decides for many runs, as it should; a fifth less does not."""
    governor, rng, now, spent = Governor(4, is_oversubscribed=True), random.Random(seed), 0.0, {0: 0, 1: 0}
    assert governor.gear == Gear(4, runs=1), "what is supposed"
    assert governor.gears[-1] == Gear(4, runs=0)
    for index in range(200 * SPELL_TOKENS):
        now += (1.0 if governor.gear.runs else many_s) * rng.uniform(0.9, 1.1)
        spent[governor.gear.runs] += index > 100 * SPELL_TOKENS
        governor.returned(4, 1.0, TRIP_S, carries_root=index % 2 == 0)
        governor.accepted(1, now)
    best = 0 if many_s < 0.6 else 1
    assert spent[best] > 0.9 * sum(spent.values()), (seed, spent)


def test_where_ranks_share_cores_it_comes_back_from_many_runs() -> None:
    governor, rng, now = Governor(4, is_oversubscribed=True), random.Random(5), 0.0
    for many_s, runs in ((0.5, 0), (2.0, 1)):
        for index in range(60 * SPELL_TOKENS):
            now += (1.0 if governor.gear.runs else many_s) * rng.uniform(0.9, 1.1)
            governor.returned(4, 1.0, TRIP_S, carries_root=index % 2 == 0)
            governor.accepted(1, now)
        assert governor.gear.runs == runs


ROWS_1 = ((1, 1.0), (8, 8.0))


def informed(pays: bool = True, plain_s: float = TRIP_S) -> Governor:
    """A governor that knows what a token of plain decoding takes, before the first one."""
    return Governor(8, prior=ROWS_1, plain_s=plain_s, pays=pays)


@pytest.mark.parametrize("seed", range(5))
def test_a_bad_draft_costs_three_tokens_at_most_in_each_of_few_trials(seed: int) -> None:
    cost_s = {0: TRIP_S, 1: 2 * TRIP_S, 2: 2 * TRIP_S, 4: 2 * TRIP_S, 8: 2 * TRIP_S}
    _, spent, _ = drive(informed(), cost_s, 64, random.Random(seed))
    assert 1 <= spent[8] <= SMALL_STAKE + 3
    _, spent, _ = drive(informed(), cost_s, 256, random.Random(seed))
    assert spent[8] <= 2 * (SMALL_STAKE + 3), "the next trial comes later"


@pytest.mark.parametrize("plain_s", [0.5 * TRIP_S, TRIP_S, 1.5 * TRIP_S])
def test_a_good_draft_is_found_good_at_once_by_any_prediction(plain_s: float) -> None:
    cost_s = {0: TRIP_S, 1: 6.0, 2: 5.0, 4: 4.0, 8: 4.0}
    _, spent, _ = drive(informed(plain_s=plain_s), cost_s, 512, random.Random(3))
    assert spent[0] <= 4 * SPELL_TOKENS
    assert spent[8] > 300


def test_without_a_prospect_decoding_starts_plain_and_tries_later() -> None:
    governor = informed(pays=False)
    assert governor.gear == Gear(0)
    cost_s = {0: TRIP_S, 1: 4.0, 2: 4.0, 4: 4.0, 8: 4.0}
    _, spent, _ = drive(governor, cost_s, 256, random.Random(1))
    assert spent == {0: 256, 1: 0, 2: 0, 4: 0, 8: 0}
    _, spent, _ = drive(governor, cost_s, 512, random.Random(1), now=256 * TRIP_S)
    assert spent[8] > 300, "the prediction was wrong, and that was found out"


def test_plain_decoding_is_tried_first_where_it_is_seen_to_be_faster() -> None:
    """Good at first, bad from then on."""
    governor, rng = informed(), random.Random(2)
    good = {0: TRIP_S, 1: 4.0, 2: 4.0, 4: 4.0, 8: 4.0}
    now, _, _ = drive(governor, good, 4 * SPELL_TOKENS, rng)
    bad = dict.fromkeys(good, 1.2 * TRIP_S) | {0: TRIP_S}
    _, spent, notes = drive(governor, bad, 12 * SPELL_TOKENS, rng, row_cost=0.0, now=now)
    assert "probe 0 rows" in notes[0]
    assert spent[0] > 6 * SPELL_TOKENS
