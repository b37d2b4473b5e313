"""The prospect of speculation by what passes take."""

from __future__ import annotations

import pytest

from speculation.schedules.cost_curve import NO_PRIORS, Priors
from speculation.schedules.prospect import prospect

ROWS = (1, 2, 4, 8, 16)


def priors(row_cost: float, draft_s: float, stages: int = 1) -> Priors:
    """Stages of a second each, whose further rows cost so much."""
    rows = tuple((rows, 1.0 + row_cost * (rows - 1)) for rows in ROWS)
    return Priors(rows, tuple((size, stages * seconds) for size, seconds in rows), ((1, draft_s), (8, draft_s)))


@pytest.mark.parametrize("placement", ["alone", "oversubscribed", "spread"])
def test_rows_as_dear_as_passes_have_none_on_one_stage(placement: str) -> None:
    assert prospect(priors(1.0, 0.15), placement, 0.9, 32) == pytest.approx(1.0)  # type: ignore[arg-type]


def test_several_stages_work_at_once_whatever_rows_cost() -> None:
    assert prospect(priors(1.0, 0.15, stages=4), "spread", 0.9, 32) > 2
    assert prospect(priors(1.0, 0.15, stages=4), "alone", 0.9, 32) == pytest.approx(1.0)


def test_it_is_that_of_the_best_chain() -> None:
    """With rows that are free and a draft that takes a tenth: max over k of E(k) / (1 + k / 10)."""
    best = max(sum(0.8**index for index in range(length + 1)) / (1 + 0.1 * length) for length in range(1, 17))
    assert prospect(priors(0.0, 0.1), "alone", 0.8, 32) == pytest.approx(best)
    assert prospect(priors(0.0, 0.1), "alone", 0.8, 2) == pytest.approx(1.8 / 1.1), "runs of two rows"


def test_a_draft_as_slow_as_its_target_pays_only_where_it_has_cores_of_its_own() -> None:
    assert prospect(priors(0.0, 1.0), "alone", 0.9, 32) == pytest.approx(1.0)
    assert prospect(priors(0.0, 1.0), "spread", 0.9, 32) > 1


def test_nothing_known_is_no_reason_to_begin_plain() -> None:
    from speculation.schedules.continuous import Continuous
    from speculation.schedules.policy import CONTINUOUS

    assert Continuous(CONTINUOUS, "alone", NO_PRIORS)._governor.gear.rows == 32  # type: ignore[union-attr]
