"""A rank that is stopped while it starts or loads is named: by the process that started it, or by another rank."""

from __future__ import annotations

import pytest

from tests.faults.matrix import Case, end

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("start", "rank", "phase"), [("spawned", 1, "joining"), ("spawned", 1, "loading"), ("mpirun", 0, "loading")]
)
def test_a_rank_that_is_stopped_is_named(start: str, rank: int, phase: str) -> None:
    case = Case("run", start, rank, phase, "freeze")
    ending = end(case, more=("--timeout", "5"))
    assert not ending.fault(case), ending.said
    assert "no progress for 5 s" in ending.said
