"""The laws notice planted faults: a mutant that survives is a law that nobody checks."""

from __future__ import annotations

import pytest

from tests.invariants.hunt import WORLDS, Mutant, hunt
from tests.invariants.mutants import MUTANTS


@pytest.mark.parametrize("planted", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_it_is_caught_by_the_one_who_should(planted: Mutant) -> None:
    catches, tried = hunt(planted, until=planted.caught_by)
    assert catches[planted.caught_by], f"{planted.caught_by} did not notice {planted.name} in {tried} worlds: {catches}"


def test_every_law_has_a_fault_of_its_own() -> None:
    laws = {mutant.caught_by for mutant in MUTANTS}
    assert {f"L{number}" for number in range(1, 12)} <= laws
    assert "StallError" in laws, "invariant L5's other half"


def test_nothing_stays_planted() -> None:
    for planted in MUTANTS:
        hunt(planted, seeds=())
    assert not hunt(Mutant("none", "nobody", lambda patch: None), WORLDS[:10])[0]
