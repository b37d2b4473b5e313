"""Scenarios: equal ranks for all, shares of layers, times by hand, and rivals at sizes that a formula gives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeinfer.bench.contenders import contender, ideal_speed, variants
from pipeinfer.bench.ideal import VOID, best_chain, best_tree, ideal
from pipeinfer.bench.scenario import EXCHANGE_BANDWIDTH, EXCHANGE_S, LATE, scenario
from pipeinfer.bench.simulated import simulate
from pipeinfer.bench.suite import Point
from pipeinfer.core.errors import UserError
from speculation.schedules.policy import CONTINUOUS, PLAIN
from stages.models.emulated import right_choices

FLAT = Point(ranks=9, top1=0.79, draft_time=0.5, stage_ms=20.0, tokens=64)
DESCRIBED = Point(ranks=9, top1=0.79, hardware="dual-xeon-e5-1gbe", target="llama-2-70b", draft="tinyllama-1.1b")


@pytest.mark.parametrize("point", [FLAT, DESCRIBED])
def test_plain_decoding_gets_the_drafter_s_rank(point: Point) -> None:
    here = scenario(point)
    assert (here.stages(PLAIN), here.stages(CONTINUOUS)) == (9, 8)
    assert sum(here.shares(PLAIN)) == sum(here.shares(CONTINUOUS)) == here.layers == 80
    assert here.trip_s(PLAIN, 1) == pytest.approx(here.trip_s(CONTINUOUS, 1), rel=5e-3), "only a hop more"


@pytest.mark.parametrize("point", [FLAT, DESCRIBED])
def test_groups_have_the_same_layers_on_the_same_ranks(point: Point) -> None:
    alone, shared = scenario(point), scenario(replace(point, tp=2))
    assert (shared.stages(PLAIN), shared.stages(CONTINUOUS)) == (4, 4), "the drafter's rank makes no group"
    assert (shared.is_rank_0_shared(PLAIN), shared.is_rank_0_shared(CONTINUOUS)) == (False, True)
    assert sum(shared.shares(CONTINUOUS)) == shared.layers == alone.layers
    assert alone.facts(PLAIN)["tp"] is None
    assert shared.facts(PLAIN)["tp"] == 2


def test_a_group_computes_a_layer_in_a_part_of_the_time_and_exchanges_twice() -> None:
    alone, shared = scenario(FLAT), scenario(replace(FLAT, tp=4, efficiency=0.75))
    assert shared.layer_s(1, 9) == pytest.approx(alone.layer_s(1, 9) / (4 * 0.75) + 2 * EXCHANGE_S)
    assert shared.draft_s(1, 9) == alone.draft_s(1, 9), "the drafter is in no group"
    alone, shared = scenario(DESCRIBED), scenario(replace(DESCRIBED, tp=2))
    few, many = (shared.layer_s(rows, 9) - alone.layer_s(rows, 9) / (2 * 0.9) for rows in (1, 101))
    assert many - few == pytest.approx(2 * 100 * 8192 * 4 / EXCHANGE_BANDWIDTH, rel=1e-6)
    assert few > 2 * EXCHANGE_S, "a layer's overhead is not divided"
    ratio = shared.facts(CONTINUOUS)["bytes_per_rank"] / alone.facts(CONTINUOUS)["bytes_per_rank"]
    assert ratio == pytest.approx(1.0, abs=0.1), "half of twice the layers, and of a head"


@pytest.mark.parametrize("name", ["plain", "continuous"])
def test_simulated_groups_say_the_same_in_about_the_time_of_closed_forms(name: str) -> None:
    points = [replace(FLAT, ranks=5, tokens=16, tp=tp) for tp in (1, 2)]
    alone, shared = (simulate(scenario(point), contender(name), 1) for point in points)
    assert shared.tokens == alone.tokens
    if name == "plain":
        wanted_s = scenario(points[1]).trip_s(PLAIN, 1)
        assert 1.0 < 1 / shared.speed / wanted_s < 1 + LATE, "each layer waits for the later rank"


def test_the_head_may_have_a_smaller_share() -> None:
    shares = scenario(FLAT).shares(CONTINUOUS, 0.5)
    assert sum(shares) == 80
    assert shares[0] == pytest.approx(shares[1] / 2, abs=1)


def test_flat_times() -> None:
    here = scenario(FLAT)
    assert here.stage_s(CONTINUOUS, 1) == here.stage_s(CONTINUOUS, 16) == pytest.approx(0.02)
    assert here.draft_s(8, 100) == pytest.approx(0.01)
    assert here.facts(CONTINUOUS)["draft_time"] == pytest.approx(0.5)
    assert here.trip_s(PLAIN, 1) == pytest.approx(0.16 + 10 * here.link.delay_s, rel=1e-3)
    assert here.ceiling == pytest.approx(1 / 0.16), "the time of a hop on this host is no part of the ceiling"


def test_described_times_are_those_of_reading_the_weights() -> None:
    here = scenario(DESCRIBED)
    weights_s = 68.5e9 * 3.85 / 8 / 75e9  # all layers and the head, at the node's bandwidth
    assert here.trip_s(PLAIN, 1) == pytest.approx(weights_s, rel=0.05)
    assert here.link.row_nbytes == 8192 * 4
    assert here.facts(CONTINUOUS)["bytes_per_rank"] == pytest.approx(68.5e9 * 3.85 / 8 / 8, rel=0.1)


@pytest.mark.parametrize(
    ("point", "word"),
    [(Point(), "ranks"), (Point(ranks=8, tp=2), "tp = 2"), (Point(ranks=3, hardware="h200"), "models"),
     (Point(ranks=99, hardware="dual-xeon-e5-1gbe", target="llama-2-70b", draft="tinyllama-1.1b"), "80 layers")],
)  # fmt: skip
def test_points_that_say_too_little_are_refused(point: Point, word: str) -> None:
    with pytest.raises(UserError, match=word):
        scenario(point)


def test_the_best_chain_and_tree_by_hand() -> None:
    # A trip of 2, a pass of 1, every guess right: (length + 1) / (2 + length) grows for ever; half right: it does not.
    assert best_chain(lambda rows: 2.0, 1.0, 1.0, longest=9) == 9
    assert best_chain(lambda rows: 2.0, 0.5, 1.0) == 1  # 1.5 / 3 = 0.5; two: 1.75 / 4
    # Rows that cost as much as the first one: the root alone.
    assert best_tree(lambda rows: 2.0 * rows, (0.5, 0.2), 1.0, most_rows=16)[1] == 1
    assert best_tree(lambda rows: 2.0, (0.5, 0.4), 0.0, most_rows=3)[1] == 3


def test_rivals_are_tuned_and_ours_is_not() -> None:
    here = scenario(FLAT)
    assert len(variants(contender("continuous"), here)) == 1
    (chain,) = variants(contender("sync-chain"), here)
    assert chain.policy.max_rows == chain.policy.num_steps + 1
    levels = best_chain(lambda rows: here.trip_s(CONTINUOUS, rows), 0.79, 0.01)
    assert chain.settings()["num_steps"] == chain.policy.num_steps == levels
    assert len(variants(contender("pipeinfer"), here)) == 8
    assert {one.head_share for one in variants(contender("pipeinfer"), here)} == {1.0, 2 / 3}
    shipped = contender("pipeinfer-shipped")
    assert variants(shipped, here) == [shipped]
    assert (shipped.policy, shipped.head_share) == (contender("pipeinfer").policy, 2 / 3)


def test_ideal_of_texts_that_are_always_or_never_guessed() -> None:
    assert ideal(4, 8, (0.9,), 0.1, [0] * 400) == pytest.approx(8.0, rel=0.03), "eight rows enter per stage time"
    assert ideal(4, 8, (0.9,), 0.5, [0] * 400) == pytest.approx(2.0, rel=0.03), "the draft finds two"
    assert ideal(4, 8, (0.9,), 0.5, [VOID] * 40) == pytest.approx(0.25, rel=0.15), "a token a trip"


def test_texts_are_as_right_as_the_point_says() -> None:
    here = scenario(FLAT)
    text = right_choices(here.model(3), here.request(3).prompt, 600)
    assert text.count(0) / 600 == pytest.approx(0.79, abs=0.05)
    assert text.count(VOID) / 600 == pytest.approx(0.03, abs=0.03)


def test_ideal_is_above_plain_and_below_one_token_a_stage_time() -> None:
    here = scenario(FLAT)
    assert 1 / 0.16 < ideal_speed(here, 0) < 1 / 0.02
