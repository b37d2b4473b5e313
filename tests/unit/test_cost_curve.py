"""What is believed of costs, and how many rows are worth sending."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from speculation.schedules.cost_curve import FIXED, LEAF_WORTH, LEAST_WEIGHT, ROW_WORTH, CostCurve

CPU = {1: 45.0, 2: 78.0, 3: 102.0, 4: 74.0, 8: 88.0}
"""Milliseconds of real fp32 layers by rows: two and three are the dearest."""


def curve_of(*passes: tuple[int, float]) -> CostCurve:
    curve = CostCurve()
    for rows, seconds in passes:
        curve.observe(rows, seconds)
    return curve


def test_measured_numbers_stand_and_on_a_slope_it_is_straight() -> None:
    curve = curve_of(*CPU.items())
    assert [curve.seconds(rows) for rows in CPU] == list(CPU.values())
    assert curve.seconds(6) == pytest.approx(81.0)
    assert curve.growth(8, 1) == pytest.approx(88 / 45)
    assert curve.least_probability(8, most=1.0) == pytest.approx(ROW_WORTH * (88 / 45 - 1) / 7)
    assert curve.least_probability(8, most=1.0, worth=LEAF_WORTH) == pytest.approx(LEAF_WORTH * (88 / 45 - 1) / 7)
    assert curve.least_probability(8, most=0.01) == 0.01
    assert [curve.knows(rows) for rows in (1, 6, 8, 9)] == [True, True, True, False]


def test_where_rows_begin_to_cost_is_found() -> None:
    """Three rows take no longer than two there; a straight line from two to four would never let anybody see it."""
    curve, useful = curve_of((1, 1.0), (2, 1.0), (4, 1.36), (6, 2.02)), [0.79**row for row in range(6)]
    assert 1.03 < curve.seconds(3) < 1.18, "half-way between the line and the bend"
    assert curve.best_count(useful) == 3
    curve.observe(3, 1.3)
    assert curve.best_count(useful) == 4, "tried, and found dear"


def test_what_is_unknown_is_tried_but_not_called_free() -> None:
    assert CostCurve().seconds(4) == 0.0
    assert CostCurve().growth(8, 1) == 1.0
    assert CostCurve().best_count([1.0, 0.1]) == 2
    assert curve_of((1, 2.0)).seconds(8) == 2.0
    assert curve_of((8, 2.0)).seconds(4) == 2.0 * (1 + FIXED) / 2
    assert curve_of((8, 2.0)).best_count([1.0, 0.3, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05]) == 3, "eight may be dear"
    assert curve_of((1, 2.0), (1, 2.0)).least_probability(8, most=0.02) == 0.02, "nobody has seen a wide pass"
    assert curve_of((1, 2.0), (8, 2.0)).least_probability(8, most=0.02) == 0


def test_runs_grow_by_doublings_unless_rows_are_dear() -> None:
    guesses = [1.0, *[0.2] * 63]

    def grown(cost: Callable[[int], float]) -> list[int]:
        """How many rows go while every run is measured before the next one leaves."""
        curve, sent = CostCurve(), list[int]()
        for _ in range(8):
            sent.append(curve.best_count(guesses[: curve.reach]))
            curve.observe(sent[-1], cost(sent[-1]))
        return sent

    assert grown(lambda rows: 1.0) == [4, 8, 16, 32, 64, 64, 64, 64]
    dear = grown(lambda rows: 1.0 if rows <= 4 else rows / 4)
    assert (max(dear), dear[-1]) == (8, 4), "what eight take tells enough of sixteen"


def test_hiccups_hardly_bend_the_curve_but_what_lasts_is_believed() -> None:
    curve = curve_of(*[(1 + index % 8, 1.0) for index in range(80)])
    for late in (1000.0, 1.0, 1.0, 1000.0):
        curve.observe(8, late)
    assert curve.growth(8, 1) < 1.12, "or guesses would seem dear that are free"
    for _ in range(30):
        curve.observe(8, 2.0)
    assert curve.seconds(8) == pytest.approx(2.0, rel=0.1)
    assert curve_of((1, 1.0), (8, 3.0)).seconds(8) == 3.0, "what was only hoped for gives way at once"


def test_what_was_not_seen_for_long_is_forgotten() -> None:
    curve = curve_of((8, 50.0), *[(1, 1.0)] * 300)
    assert LEAST_WEIGHT > 0.99**300
    assert curve.seconds(8) == 1.0, "it may be tried again"


def test_an_early_word_stands_until_a_run_is_back() -> None:
    curve = curve_of((1, 1.0))
    curve.expect(8, 6.0)
    assert curve.knows(8)
    guesses = [1.0, *[0.3] * 7]
    assert curve.best_count(guesses) < 8 == curve_of((1, 1.0)).best_count(guesses)
    curve.expect(8, 3.0)
    curve.expect(1, 9.0)
    assert (curve.seconds(8), curve.seconds(1)) == (3.0, 1.0), "the newest word, but never over what is measured"
    curve.observe(8, 4.0)
    curve.expect(8, 3.0)
    assert curve.seconds(8) == 4.0


def test_the_count_gives_the_most_useful_rows_per_second_over_any_dip() -> None:
    curve = curve_of(*CPU.items())
    guesses = [1.0, 0.6, 0.4, 0.25, 0.2, 0.15, 0.1, 0.1]

    def rate(count: int) -> float:
        return sum(guesses[:count]) / curve.seconds(count)

    assert rate(2) < rate(1), "the second row alone would not pay"
    assert curve.best_count(guesses) == max(range(1, 9), key=rate) == 6
    assert curve.best_count([1.0, 0.1, 0.1]) == 1
    dear = curve_of(*[(rows, float(rows)) for rows in (1, 2, 4, 8)])
    assert dear.best_count([1.0, 0.99]) == 1
    assert dear.best_count([0.5, 0.6]) == 2
    assert curve_of((1, 1.0), (8, 1.0)).best_count([1.0, 0.01, 0.0]) == 3, "free rows are welcome, whatever they are"


PRIOR = ((1, 1.0), (2, 1.2), (4, 1.6), (8, 3.0))


def test_a_prior_is_believed_before_anything_is_measured() -> None:
    curve = CostCurve(PRIOR)
    assert [curve.seconds(rows) for rows, _ in PRIOR] == [seconds for _, seconds in PRIOR]
    assert curve.reach == 16
    assert curve.knows(3) and not curve.knows(9)
    assert CostCurve(((1, 1.0), (2, 2.0), (4, 4.0))).best_count([1.0, 0.9, 0.8]) == 1, "rows are dear, without a trial"


def test_measurements_replace_a_prior() -> None:
    curve = CostCurve(PRIOR)
    for _ in range(12):
        curve.observe(4, 3.0)
    assert curve.seconds(4) == pytest.approx(3.0, rel=0.02)


def test_on_a_busy_machine_what_is_not_measured_is_late_alike() -> None:
    curve = CostCurve(PRIOR)
    for _ in range(30):
        curve.observe(1, 2.0)
        curve.observe(4, 3.2)
    assert [curve.seconds(rows) for rows, _ in PRIOR] == pytest.approx([2.0, 2.4, 3.2, 6.0], rel=0.05)
    assert curve.best_count([1.0, 0.9]) == CostCurve(PRIOR).best_count([1.0, 0.9])


def test_a_forgotten_measurement_gives_way_to_the_prior() -> None:
    curve = CostCurve(PRIOR)
    curve.observe(8, 6.0)
    for _ in range(300):
        curve.observe(1, 1.0)
    assert curve.seconds(8) == pytest.approx(3.0, rel=0.05)


def test_another_stage_s_time_does_not_lower_the_prior_of_the_slowest() -> None:
    curve = CostCurve(PRIOR)
    curve.expect(4, 0.8)
    assert curve.seconds(4) == 1.6
    curve.expect(4, 2.0)
    assert curve.seconds(4) == 2.0
