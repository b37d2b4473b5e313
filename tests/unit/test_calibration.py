"""Probabilities come to mean what they say, soon, for drafts of every kind; and no outcome breaks the map."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import Calibrate, Message
from pipeinfer.core.wire import decode, encode
from speculation.trees.calibration import (
    LEAST_LOGP,
    MOST,
    OFFSET_PRIOR,
    RANKS,
    REFIT_EVERY,
    SLOPE_PRIOR,
    WINDOW,
    Calibration,
    Reliability,
)
from tests.unit.effort import lines_of

Outcome = tuple[list[float], int | None]
ODD = st.sampled_from([0.0, -0.0, 1.0, -1e-12, -1e-300, -50.0, -1e300, math.inf, -math.inf, math.nan])
CLAIMS = st.one_of(ODD, st.floats(-30.0, 0.0))


def same_claims(claims: list[float], ranks: list[float], count: int, seed: int = 0) -> Iterator[Outcome]:
    """A draft that always claims the same; its k-th choice is right with probability ``ranks[k]``."""
    draws = np.random.default_rng(seed)
    shares = [*ranks, 1.0 - sum(ranks)]
    for _ in range(count):
        rank = int(draws.choice(len(shares), p=shares))
        yield [math.log(claim) for claim in claims], rank if rank < len(claims) else None


def softmax(inverse_temperature: float, count: int, choices: int = 4, seed: int = 0) -> Iterator[Outcome]:
    """A draft that knows the target's logits and multiplies them; some contexts are clear and some are not."""
    draws = np.random.default_rng(seed)
    for _ in range(count):
        logits = draws.normal(0.0, 2.0 * draws.gamma(2.0, 0.7), 50)
        p = np.exp(logits - np.logaddexp.reduce(logits))
        truth = int(draws.choice(50, p=p / p.sum()))
        sharp = inverse_temperature * logits
        claimed = sharp - np.logaddexp.reduce(sharp)
        named = np.argsort(-claimed)[:choices].tolist()
        yield claimed[named].tolist(), named.index(truth) if truth in named else None


def bursts(count: int, seed: int = 0) -> Iterator[Outcome]:
    """A draft that is right for some 40 tokens and wrong for the next 40, and claims 0.6 or so all the time."""
    draws = np.random.default_rng(seed)
    is_good = True
    for _ in range(count):
        is_good ^= bool(draws.random() < 1 / 40)
        claim = min(0.97, max(0.03, draws.normal(0.6, 0.15)))
        yield [math.log(claim)], 0 if draws.random() < (0.95 if is_good else 0.1) else None


def judge(stream: Iterator[Outcome], after: int = 0) -> tuple[float, float, Calibration]:
    """ECE of the claims and of what the calibration made of them, each told before the outcome, from ``after`` on."""
    calibration, claims, beliefs = Calibration(), Reliability(), Reliability()
    for index, (claimed, hit) in enumerate(stream):
        for rank, logp in enumerate(claimed if index >= after else []):
            claims.add(math.exp(logp), rank == hit)
            beliefs.add(math.exp(calibration.logp(rank, logp)), rank == hit)
        calibration.observe(claimed, hit)
    return claims.error(), beliefs.error(), calibration


def believed(calibration: Calibration, rank: int, claim: float) -> float:
    return math.exp(calibration.logp(rank, math.log(claim)))


def taught(stream: Iterator[Outcome]) -> Calibration:
    return judge(stream)[2]


# What it learns, and how soon.


def test_it_begins_as_the_identity() -> None:
    calibration = Calibration()
    for rank in (0, RANKS - 1, RANKS + 5):
        for logp in (-9.0, -2.3, -0.7, -0.01):
            assert calibration.logp(rank, logp) == pytest.approx(logp)
    assert calibration.revision == 0


def test_a_draft_that_is_never_right_is_soon_not_believed() -> None:
    calibration = Calibration()
    beliefs = []
    for claimed, hit in same_claims([0.8], [0.0], 200):
        calibration.observe(claimed, hit)
        beliefs.append(believed(calibration, 0, 0.8))
    assert beliefs[15] < 0.3 and beliefs[49] < 0.08 and beliefs[99] < 0.05 and beliefs[199] < 0.025


def test_a_draft_that_is_always_right_is_soon_believed() -> None:
    assert believed(taught(same_claims([0.6], [1.0], 100)), 0, 0.6) > 0.95


def test_claims_that_never_vary_are_learnt_rank_by_rank() -> None:
    claims, ranks = [0.8, 0.1, 0.05, 0.02], [0.5, 0.25, 0.03, 0.1]
    calibration = taught(same_claims(claims, ranks, 250))
    assert [believed(calibration, *pair) for pair in enumerate(claims)] == pytest.approx(ranks, abs=0.06)
    before, after, _ = judge(same_claims(claims, ranks, 1000), after=150)
    assert before > 0.12 and after < 0.03


def test_what_is_claimed_impossible_may_be_learnt_too() -> None:
    claims, ranks = [0.8, 1e-9], [0.4, 0.3]
    calibration = taught(same_claims(claims, ranks, 200))
    assert [believed(calibration, *pair) for pair in enumerate(claims)] == pytest.approx(ranks, abs=0.1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("inverse_temperature", [2.0, 0.5])
def test_a_wrong_temperature_is_found(inverse_temperature: float, seed: int) -> None:
    before, after, calibration = judge(softmax(inverse_temperature, 1000, seed=seed), after=150)
    assert before > 0.05
    assert after < before / 2
    assert calibration.slope < 0.8 if inverse_temperature > 1 else calibration.offsets[0] > 0.5


def test_an_honest_draft_is_left_alone() -> None:
    before, after, calibration = judge(softmax(1.0, 1000))
    assert before < 0.02 and after < 0.03
    assert calibration.slope == pytest.approx(1.0, abs=0.3)


def test_little_evidence_changes_little() -> None:
    surprised = taught(same_claims([0.3], [0.0], REFIT_EVERY))
    assert 0.1 < believed(surprised, 0, 0.3) < 0.3
    lucky = taught(iter([([math.log(0.02)], 0), *same_claims([0.02], [0.0], REFIT_EVERY - 1)]))
    assert 0.02 < believed(lucky, 0, 0.02) < 0.1
    assert surprised.offsets[1:] == [0.0] * (RANKS - 1)


def test_it_settles_where_the_outcomes_and_the_prior_are_most_probable() -> None:
    seen = [*softmax(2.0, WINDOW)]
    calibration = taught(iter(seen * 4))

    def doubt(slope: float, offsets: list[float]) -> float:
        """Minus the log of the posterior, up to a constant; no claim here is an extreme one."""
        total = SLOPE_PRIOR / 2 * (slope - 1) ** 2 + OFFSET_PRIOR / 2 * sum(offset**2 for offset in offsets)
        for claimed, hit in seen:
            for rank, logp in enumerate(claimed):
                logit = min(10.0, max(-10.0, logp - math.log(-math.expm1(logp))))
                z = offsets[rank] + slope * logit
                total += math.log1p(math.exp(-z if rank == hit else z))
        return total

    least = doubt(calibration.slope, calibration.offsets)
    for step in (-0.01, 0.01):
        assert doubt(calibration.slope + step, calibration.offsets) > least
        for rank in range(RANKS):
            moved = [offset + step * (rank == other) for other, offset in enumerate(calibration.offsets)]
            assert doubt(calibration.slope, moved) > least


def test_certainty_that_is_wrong_is_unlearnt_without_swinging() -> None:
    never, turned = Calibration(), taught(iter([([0.0], 0)] * 400))
    for calibration, count, most in ((never, 96, 0.06), (turned, WINDOW, 0.03)):
        beliefs = []
        for _ in range(count):
            calibration.observe([0.0], None)
            beliefs.append(math.exp(calibration.logp(0, 0.0)))
        assert beliefs[-1] < most
        assert all(abs(before - after) < 0.7 for before, after in pairwise(beliefs))
        assert all(before >= after for before, after in pairwise(beliefs[32:]))


def test_bursts_neither_break_it_nor_make_it_worse() -> None:
    before, after, calibration = judge(bursts(4000))
    assert after < before
    assert 0.2 < believed(calibration, 0, 0.6) < 0.9


def test_it_follows_a_draft_that_changes() -> None:
    stream = [*same_claims([0.8], [0.0], 400), *same_claims([0.8], [0.9], WINDOW)]
    assert believed(taught(iter(stream)), 0, 0.8) == pytest.approx(0.9, abs=0.05)


def test_a_rank_that_was_not_named_learns_nothing() -> None:
    sparse, triples = Calibration(), Calibration()
    for index in range(64):
        sparse.observe([math.nan, math.nan, -0.5], 2 if index % 4 else None)
        triples.learn([(2, -0.5, index % 4 > 0), (RANKS, -0.1, False), (-1, -0.1, True)])
    assert sparse == triples
    assert [offset != 0.0 for offset in sparse.offsets] == [rank == 2 for rank in range(RANKS)]


# What cannot break it.


@given(st.lists(st.tuples(st.lists(CLAIMS, max_size=5), st.integers(0, 9)), max_size=40), st.integers(1, 4))
def test_no_outcome_breaks_it(outcomes: list[tuple[list[float], int]], ranks: int) -> None:
    calibration = Calibration(ranks)
    for claimed, hit in outcomes * 8:
        calibration.observe(claimed, hit if hit < len(claimed) else None)
    assert calibration.slope > 0.0
    ladder = sorted([-1e300, -30.0, -9.0, -3.0, -1.0, -0.1, -1e-3, -1e-5, 0.0, 1.0])
    for rank in range(ranks + 1):
        made = [calibration.logp(rank, logp) for logp in (math.nan, -math.inf, *ladder, math.inf)]
        assert all(low <= high for low, high in pairwise(made))
        assert made[0] >= LEAST_LOGP and made[-1] <= math.log(MOST)
    assert Calibration.from_words(calibration.to_words()) == calibration


def test_a_hit_without_a_rank_is_refused() -> None:
    for hit in (-1, 1):
        with pytest.raises(IndexError, match=f"rank {hit} of 1"):
            Calibration().observe([-0.5], hit)
    with pytest.raises(ValueError, match="at least one rank"):
        Calibration(0)


# How it travels and what it costs.


def test_the_revision_tells_of_every_refit() -> None:
    calibration = Calibration()
    for index in range(3 * REFIT_EVERY):
        assert calibration.revision == index // REFIT_EVERY
        calibration.observe([-0.5], None)
    assert calibration.outcomes == 3 * REFIT_EVERY


def test_words_tell_all_of_the_map() -> None:
    calibration = taught(softmax(2.0, 100))
    copy = Calibration.from_words(json.loads(json.dumps(calibration.to_words())))
    assert copy == calibration and copy != Calibration() and copy != "something else"
    assert copy.logp(1, -2.0) == calibration.logp(1, -2.0)
    assert repr(copy) == repr(calibration) and "slope" in repr(copy)


def test_what_was_learnt_before_is_the_prior() -> None:
    copy = Calibration.from_words(taught(same_claims([0.8], [0.1], 256)).to_words())
    known = believed(copy, 0, 0.8)
    for claimed, hit in same_claims([0.8], [0.1], REFIT_EVERY):
        copy.observe(claimed, hit)
    assert believed(copy, 0, 0.8) == pytest.approx(known, abs=0.1)


def test_a_message_tells_all_of_the_map() -> None:
    calibration = taught(softmax(2.0, 100))
    message = calibration.message()
    assert (message.revision, message.outcomes) == (calibration.revision, calibration.outcomes)
    assert (message.slope, list(message.offsets)) == (calibration.slope, calibration.offsets)
    body = decode(encode(Message(0, 0x8000, message))).body
    assert isinstance(body, Calibrate)
    assert Calibration.of(message) == Calibration.of(body) == calibration


@pytest.mark.parametrize(
    "wrong",
    [
        {"slope": math.nan}, {"slope": 0.0}, {"slope": None}, {"offsets": []}, {"offsets": [math.inf]}, {"offsets": 3},
        {"revision": -1}, {"outcomes": math.inf}, {"slope": "steep"},
    ],
    ids=str,
)  # fmt: skip
def test_unsound_words_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="calibration|convert|rank"):
        Calibration.from_words(Calibration().to_words() | wrong)
    with pytest.raises(ValueError, match="slope"):
        Calibration.from_words({"offsets": [0.0]})


@pytest.mark.parametrize(
    "wrong",
    [
        {"offsets": ()}, {"offsets": (0.0, math.nan)}, {"offsets": (math.inf,)}, {"slope": 0.0}, {"slope": math.nan},
        {"revision": -1}, {"outcomes": -1},
    ],
    ids=str,
)  # fmt: skip
def test_an_unsound_message_is_a_peers_fault(wrong: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError, match="calibration"):
        Calibration.of(Calibration().message()._replace(**wrong))


def test_it_is_little_work() -> None:
    calibration = Calibration()
    claimed = [-0.5, -1.5, -2.5, -3.5, -4.5, -5.5, -6.5, -7.5]
    spent = [lines_of(lambda index=index: calibration.observe(claimed, index % 8)) for index in range(500)]
    assert sum(spent) / len(spent) < 100
    assert lines_of(lambda: calibration.logp(3, -1.5)) < 10


# The table.


def test_the_table_compares_what_was_said_with_what_came() -> None:
    table = Reliability(bins=4)
    for hit in (True, True, False, False):
        table.add(0.6, hit)
    table.add(1.0, True)
    table.add(0.0, False)
    assert table.rows() == [(0.0, 0.0, 1), (pytest.approx(0.6), 0.5, 4), (1.0, 1.0, 1)]
    assert table.error() == pytest.approx(0.1 * 4 / 6)


def test_an_empty_table_has_no_error() -> None:
    assert Reliability().error() == 0.0 and Reliability().rows() == []


def test_the_table_takes_probabilities_only() -> None:
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="probability"):
            Reliability().add(wrong, True)
    with pytest.raises(ValueError, match="bin"):
        Reliability(0)
