"""Blocks of slots, against sets that are searched in the plainest way."""

from __future__ import annotations

import random

import pytest

from kvbuffers.free_slots import BLOCK, FreeSlots


def test_a_sequence_alone_gets_the_lowest_slots() -> None:
    free = FreeSlots(3 * BLOCK)
    assert free.take(1, BLOCK + 2) == list(range(BLOCK + 2))
    free.give([7, 3, BLOCK])
    assert free.take(1, 4) == [3, 7, BLOCK, BLOCK + 2]


def test_sequences_have_blocks_of_their_own() -> None:
    free = FreeSlots(4 * BLOCK)
    assert (free.take(1, 2), free.take(2, 2)) == ([0, 1], [BLOCK, BLOCK + 1])
    assert (free.take(1, 1), free.take(2, 1)) == ([2], [BLOCK + 2])
    assert free.take(1, BLOCK)[-4:] == [31, 2 * BLOCK, 2 * BLOCK + 1, 2 * BLOCK + 2]


def test_where_no_block_is_free_slots_of_other_blocks_are_taken() -> None:
    free = FreeSlots(2 * BLOCK + 3)  # the last block is short, and one like any other
    assert (free.take(1, 1), free.take(2, 1), free.take(3, 1)) == ([0], [BLOCK], [2 * BLOCK])
    assert free.take(4, 2 * BLOCK - 2) == [*range(1, BLOCK), *range(BLOCK + 1, 2 * BLOCK)]
    assert (free.take(4, 2), len(free)) == ([2 * BLOCK + 1, 2 * BLOCK + 2], 0)


def test_a_free_block_is_kept_by_its_owner_until_another_sequence_takes_it() -> None:
    free = FreeSlots(2 * BLOCK)
    slots = free.take(1, BLOCK + 1)
    free.give(slots[:BLOCK])
    assert free.take(1, 1) == [0], "the lowest, though the second block is partly used"
    free.give([0])
    assert free.take(2, 1) == [0]
    assert free.take(1, 1) == [BLOCK + 1], "the first block is another one's"


def test_the_blocks_of_a_sequence_that_is_over_are_for_everybody() -> None:
    free = FreeSlots(2 * BLOCK)
    assert (free.take(1, 1), free.take(2, 1)) == ([0], [BLOCK])
    free.give([0])
    free.forget(1)
    assert free.take(3, 1) == [0]


@pytest.mark.parametrize("seed", range(20))
def test_slots_are_those_that_the_rule_names(seed: int) -> None:
    """The seed is the test's parameter."""
    dice = random.Random(seed)
    capacity = dice.choice((5, BLOCK, 4 * BLOCK + 7, 9 * BLOCK))
    free, here, owner = FreeSlots(capacity), set(range(capacity)), dict[int, int]()
    taken: dict[int, list[int]] = {name: [] for name in range(4)}
    blocks = [set(range(first, min(first + BLOCK, capacity))) for first in range(0, capacity, BLOCK)]
    for _ in range(300):
        name = dice.choice([*taken])
        if dice.random() < 0.5:
            for slot in free.take(name, dice.randint(0, min(len(here), 2 * BLOCK))):
                mine = sorted(slot for slot in here if owner.get(slot // BLOCK) == name)
                whole = [index for index, block in enumerate(blocks) if block <= here]
                wanted = mine[0] if mine else BLOCK * whole[0] if whole else min(here)
                assert slot == wanted
                if not mine and whole:
                    owner[whole[0]] = name
                here.remove(slot)
                taken[name].append(slot)
        else:
            dice.shuffle(taken[name])
            count = dice.randint(0, len(taken[name]))
            back, taken[name] = taken[name][:count], taken[name][count:]
            free.give(back)
            here.update(back)
        assert (len(free), set(free)) == (len(here), here)
