"""The invariants detect planted faults: a mutant that survives shows an invariant without a check."""

from __future__ import annotations

import pytest

from tests.invariants.hunt import WORLDS, Mutant, hunt, likely_first
from tests.invariants.mutants import MUTANTS


@pytest.mark.parametrize("planted", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_it_is_caught_by_the_one_who_should(planted: Mutant) -> None:
    catches, tried = hunt(planted, likely_first(planted), until=planted.caught_by)
    assert catches[planted.caught_by], f"{planted.caught_by} did not notice {planted.name} in {tried} worlds: {catches}"


def test_every_invariant_has_a_fault_of_its_own() -> None:
    invariants = {mutant.caught_by for mutant in MUTANTS}
    assert {f"L{number}" for number in range(1, 12)} <= invariants
    assert "StallError" in invariants, "invariant L5's other half"


def test_nothing_stays_planted() -> None:
    for planted in MUTANTS:
        hunt(planted, seeds=())
    assert not hunt(Mutant("none", "nobody", lambda patch: None), WORLDS[:10])[0]
