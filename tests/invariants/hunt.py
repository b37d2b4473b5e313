"""Planted faults and the hunt for them: in how many random worlds is a change of the code detected, and by which
invariant?

``python -m tests.invariants.hunt`` prints it for every fault; with ``--first`` the first world in which the right
invariant notices each, for first_worlds.py.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from pipeinfer.core.errors import LocalProtocolError, RemoteProtocolError, StallError
from pipeinfer.sim.history import InvariantBroken
from pipeinfer.sim.many_worlds import many_world
from pipeinfer.sim.random_worlds import check_world, random_world
from tests.invariants.first_worlds import FIRST

WORLDS = range(300)  # the rarest fault shows in one of a hundred and fifty
CATCHES = (InvariantBroken, LocalProtocolError, RemoteProtocolError, StallError)
"""What says that a fault was noticed: an invariant, or the machines' own checks."""
Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True, slots=True)
class Mutant:
    """A fault, and the invariant (or the error of the machines' own checks) that must be among those who catch it.

    ``schedule``: of the worlds in which it is looked for; mixed ones if empty. ``many``: whether these are worlds of
    many requests."""

    name: str
    caught_by: str
    plant: Plant
    schedule: str = ""
    many: bool = False


def roll(mutants: list[Mutant], many: bool = False) -> Callable[..., Callable[[Plant], Plant]]:
    """A decorator that enlists faults in ``mutants``: ``@mutant("L3")`` says who must notice, a second word in the
    worlds of which schedule. ``many``: see Mutant."""

    def mutant(caught_by: str, schedule: str = "") -> Callable[[Plant], Plant]:
        def enlist(plant: Plant) -> Plant:
            mutants.append(Mutant(plant.__name__, caught_by, plant, schedule, many))
            return plant

        return enlist

    return mutant


def hunt(
    planted: Mutant, seeds: Sequence[int] = WORLDS, most: int | None = None, until: str = ""
) -> tuple[Counter[str], int]:
    """Who caught the fault in how many worlds, and in how many it was looked for.

    ``most`` catches, or one by ``until``, are enough."""
    catches: Counter[str] = Counter()
    tried, draw = 0, many_world if planted.many else random_world
    with pytest.MonkeyPatch.context() as patch:
        planted.plant(patch)
        for seed in seeds:
            tried += 1
            try:
                check_world(draw(seed, planted.schedule))
            except CATCHES as error:  # whatever else is raised is the fault's own: what it patches has changed
                invariant = str(error).partition(":")[0]
                catches[invariant if invariant[:1] == "L" and invariant[1:].isdigit() else type(error).__name__] += 1
            if catches[until] or catches.total() == most:
                break
    return catches, tried


def likely_first(planted: Mutant) -> list[int]:
    """All of WORLDS, the one in which the fault was noticed before being the first."""
    known = [FIRST[planted.name]] if planted.name in FIRST else []
    return [*known, *(seed for seed in WORLDS if seed not in known)]


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by ``around(original, *arguments)``."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *arguments, **options: around(original, *arguments, **options))


def main() -> None:
    from tests.invariants.mutants import MUTANTS

    for planted in MUTANTS:
        if sys.argv[1:] == ["--first"]:
            print(f'    "{planted.name}": {hunt(planted, until=planted.caught_by)[1] - 1},', flush=True)
            continue
        catches, tried = hunt(planted)
        by = ", ".join(f"{invariant} {count}" for invariant, count in catches.most_common())
        worlds = f"{tried} {'many ' * planted.many}{planted.schedule or 'mixed'}"
        print(f"{planted.name:57} {catches.total():4} of {worlds:19}  ({planted.caught_by} wanted)  {by}", flush=True)


if __name__ == "__main__":
    main()
