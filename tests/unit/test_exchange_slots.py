"""How many slots exchanges need (stages/kernels/native/exchange.h, head.h): every interleaving of a few ranks' steps.

A rank's program is a list of steps. A step may wait for another rank's flag of an exchange; a step that reads finds in
the other's slot what was written there last. No rank may find another exchange's numbers there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pytest


@dataclass(frozen=True)
class Step:
    """``kind``: begin to write, write (the flag is there), read or wait: of a part (shot 0), a result (shot 1) or a
    word that all is read (shot 2), of ``rank``, in exchange ``epoch``."""

    kind: str
    rank: int
    shot: int
    epoch: int


def program(kinds: Sequence[str], me: int, ranks: int, acknowledges: bool = True) -> list[Step]:
    """What rank ``me`` does in exchanges of these kinds. Without ``acknowledges`` nobody waits after a choice."""
    steps: list[Step] = []
    for epoch, kind in enumerate(kinds, 1):
        steps += [Step("begin", me, 0, epoch), Step("write", me, 0, epoch)]
        if kind == "choose":  # the first rank reads all, and the others wait until it has
            if me == 0:
                steps += [Step("read", rank, 0, epoch) for rank in range(ranks)]
                steps.append(Step("write", 0, 2, epoch))
            elif acknowledges:
                steps.append(Step("wait", 0, 2, epoch))
            continue
        steps += [Step("read", rank, 0, epoch) for rank in range(ranks)]
        if kind == "two shots":
            steps += [Step("begin", me, 1, epoch), Step("write", me, 1, epoch)]
            steps += [Step("read", rank, 1, epoch) for rank in range(ranks) if rank != me]
    return steps


def is_safe(kinds: Sequence[str], ranks: int, slots: int, acknowledges: bool = True) -> bool:
    """Whether no interleaving lets a rank read another exchange's numbers."""
    programs = [program(kinds, me, ranks, acknowledges) for me in range(ranks)]
    seen, left = {(0,) * ranks}, [(0,) * ranks]

    def done(kind: str, state: tuple[int, ...], rank: int, shot: int) -> list[int]:
        steps = programs[rank][: state[rank]]
        return [step.epoch for step in steps if step.kind == kind and step.shot == shot]

    while left:
        state = left.pop()
        for me, place in enumerate(state):
            if place == len(programs[me]):
                continue
            step = programs[me][place]
            if step.kind in ("read", "wait"):
                if max(done("write", state, step.rank, step.shot), default=0) < step.epoch:
                    continue  # the flag is not there
                begun = done("begin", state, step.rank, step.shot)
                if step.kind == "read" and [one for one in begun if (one - step.epoch) % slots == 0][-1] != step.epoch:
                    return False
            after = (*state[:me], place + 1, *state[me + 1 :])
            if after not in seen:
                seen.add(after)
                left.append(after)
    return True


KINDS = ("one shot", "two shots", "choose")


@pytest.mark.parametrize("ranks", [2, 3])
def test_two_slots_are_enough_for_any_sequence(ranks: int) -> None:
    for kinds in product(KINDS, repeat=5 if ranks == 2 else 4):
        assert is_safe(kinds, ranks, slots=2), kinds


def test_one_slot_is_not_and_nobody_may_go_ahead_after_a_choice() -> None:
    assert not is_safe(("one shot",) * 2, 2, slots=1)
    assert not is_safe(("one shot", "choose", "choose"), 3, slots=2, acknowledges=False)
