"""The pacer asks for the next run just before the current one ends, and at once while it knows too little."""

from __future__ import annotations

import pytest

from stages.stage.pacer import SAFETY, Pacer


def taught(pass_s: float = 10.0, answer_s: float = 1.0) -> Pacer:
    """A pacer that has seen one pass of 4 rows and one answer; its clock stands at 100."""
    pacer = Pacer()
    assert pacer.begin(0.0, 4) is None
    pacer.credited(0.0)
    pacer.arrived(answer_s)
    pacer.end(pass_s, is_abandoned=False)
    return pacer


def test_what_it_does_not_know_it_asks_at_once() -> None:
    pacer = taught()
    assert pacer.begin(100.0, 5) is None
    assert Pacer().begin(0.0, 1) is None


def test_it_asks_as_long_before_the_end_as_an_answer_takes() -> None:
    assert taught().begin(100.0, 4) == pytest.approx(110.0 - SAFETY)
    assert taught(pass_s=1.0).begin(100.0, 4) is None, "the answer takes longer than the pass"


def test_an_abandoned_pass_teaches_nothing() -> None:
    pacer = taught()
    pacer.begin(100.0, 4)
    pacer.end(1.0, is_abandoned=True)
    assert pacer.begin(200.0, 4) == pytest.approx(210.0 - SAFETY)


def test_being_woken_late_makes_it_ask_earlier() -> None:
    pacer = taught()
    due = pacer.begin(100.0, 4)
    assert due is not None
    pacer.woke(due + 2.0)
    later = pacer.begin(200.0, 4)
    assert later is not None
    assert later - 200.0 < due - 100.0


def test_slow_answers_had_nothing_to_say() -> None:
    pacer = taught()
    for now in (100.0, 200.0, 300.0):
        pacer.credited(now)
        pacer.arrived(now + 50.0)
    assert pacer.begin(400.0, 4) == pytest.approx(410.0 - SAFETY, abs=0.1)
    pacer.credited(500.0)
    pacer.arrived(500.5)
    assert pacer.begin(600.0, 4) == pytest.approx(610.0 - SAFETY / 2)
