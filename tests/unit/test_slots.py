"""What rows attend to, against lists that are kept in the plainest way."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kvbuffers.slot_table import SlotTable
from pipeinfer.core.messages import NO_SLOT, Row, SlotOp, SlotOpKind
from pipeinfer.core.ports import Batch, Sampling
from pipeinfer.core.slots import FEW_RANGES, FEW_SLOTS, attended, batch_in_order, slots_of, visible_slots

CAPACITY = 96


class Naive:
    """One sequence of a slot table as lists: of each leased slot its position and all slots that it attends to."""

    def __init__(self) -> None:
        self.canonical: list[int] = []
        self.leased: dict[int, tuple[int, list[int]]] = {}

    def allocate(self, row: Row, canonical: bool) -> list[int]:
        if row.parent in self.leased:
            above = self.leased[row.parent][1]
        elif row.parent == NO_SLOT:
            above = self.canonical
        else:
            above = self.canonical[: self.canonical.index(row.parent) + 1]
        self.leased[row.slot] = row.position, [*above, row.slot]
        found = self.leased[row.slot][1]
        if canonical:
            self.commit(row.slot)
        return found

    def commit(self, slot: int) -> None:
        del self.leased[slot]
        self.canonical.append(slot)


class Twins:
    """A table and naive sequences, led by dice."""

    def __init__(self, seed: int, sequences: int) -> None:
        self.dice, self.table = random.Random(seed), SlotTable(CAPACITY)
        self.naive = {sequence: Naive() for sequence in range(sequences)}
        self.token: dict[int, int] = {}
        self.joined_before_the_end = self.longest_path = self.most_ranges = self.most_sequences = 0

    def free_slots(self) -> list[int]:
        used = {slot for one in self.naive.values() for slot in (*one.canonical, *one.leased)}
        return [slot for slot in range(CAPACITY) if slot not in used]

    def prompt(self) -> None:
        sequence, free = self.dice.choice([*self.naive]), self.free_slots()
        length = len(self.naive[sequence].canonical)
        if self.dice.random() < 0.5:
            self.dice.shuffle(free)
        count = self.dice.randint(1, 6)
        slots = enumerate(free[:count], length)
        self.allocate([self.row(slot, NO_SLOT, position, sequence) for position, slot in slots], True)

    def tree(self) -> None:
        free, rows = self.free_slots(), list[Row]()
        self.dice.shuffle(free)
        places = {name: self.places(one) for name, one in self.naive.items()}
        for slot in free[: self.dice.randint(1, 8)]:
            sequence = self.dice.choice([*self.naive])
            here, canonical = places[sequence], self.naive[sequence].canonical
            parent = self.dice.choice([*here][-8:] + canonical[-3:])
            rows.append(self.row(slot, parent, here[parent] + 1, sequence))
            here[slot] = here[parent] + 1
            self.joined_before_the_end += parent in canonical[:-1]
        self.allocate(rows, False)

    @staticmethod
    def places(one: Naive) -> dict[int, int]:
        """The positions of what a row may descend from."""
        found = {slot: position for position, slot in enumerate(one.canonical)}
        found |= {slot: position for slot, (position, _) in one.leased.items()}
        return found | {NO_SLOT: len(one.canonical) - 1}

    def row(self, slot: int, parent: int, position: int, sequence: int) -> Row:
        return Row(self.dice.randrange(9), slot, parent, position, sequence)

    def allocate(self, rows: list[Row], canonical: bool) -> None:
        if rows:
            self.token |= {row.slot: row.token for row in rows}
            wanted = [self.naive[row.sequence].allocate(row, canonical) for row in rows]
            assert self.table.living(rows) == tuple(range(len(rows)))
            self.compare(self.table.allocate(rows, canonical), wanted)

    def commit(self) -> None:
        sequence, one = self.dice.choice([*self.naive.items()])
        length = len(one.canonical)
        if found := [slot for slot, (position, _) in one.leased.items() if position == length]:
            slot = self.dice.choice(found)
            self.table.apply([SlotOp(SlotOpKind.COMMIT, slot, 1, length, sequence)])
            one.commit(slot)

    def release(self) -> None:
        sequence, one = self.dice.choice([*self.naive.items()])
        dead = set(self.dice.sample(sorted(one.leased), len(one.leased) // 4))
        for slot in [slot for slot, (_, path) in one.leased.items() if dead.intersection(path)]:
            self.table.apply([SlotOp(SlotOpKind.RELEASE, slot, 1, 0, sequence)])
            del one.leased[slot]

    def free(self) -> None:
        sequence = self.dice.choice([*self.naive])
        self.table.apply([SlotOp(SlotOpKind.FREE, sequence=sequence)])
        self.naive[sequence] = Naive()

    def truncate(self) -> None:
        sequence, one = self.dice.choice([*self.naive.items()])
        length = self.dice.randint(0, len(one.canonical))
        self.table.apply([SlotOp(SlotOpKind.TRUNCATE, length=length, sequence=sequence)])
        one.canonical, one.leased = one.canonical[:length], {}

    def compare(self, batch: Batch, wanted: list[list[int]]) -> None:
        mask = visible_slots(batch)
        assert [row.nonzero()[0].tolist() for row in mask] == [sorted(slots) for slots in wanted]
        assert [attended(batch, row).tolist() for row in range(len(wanted))] == wanted, "in order of position"
        sampling = Sampling(repetition_penalty=1.5, presence_penalty=0.5, prompt_length=self.dice.randrange(9))
        draw = self.table.draw([sampling] * len(wanted), batch, range(len(wanted)))
        texts = [[self.token[slot] for slot in slots] for slots in wanted]
        assert [found.tolist() for found in draw.seen] == [sorted(set(text)) for text in texts]
        assert [found.tolist() for found in draw.generated] == [text[sampling.prompt_length :] for text in texts]
        self.table.check()
        counts = [(len(one.leased), len(one.canonical)) for one in self.naive.values()]
        assert self.table.counts()[1:] == tuple(map(sum, zip(*counts, strict=True)))
        own = batch.ancestor_ends - [0, *batch.ancestor_ends[:-1]]
        self.longest_path = max(self.longest_path, own.max().item())
        self.most_ranges = max(self.most_ranges, *[len(ranges) for ranges in batch.canonical])
        self.most_sequences = max(self.most_sequences, len(batch.canonical))


@pytest.mark.parametrize("sequences", [1, 2, 4])
@pytest.mark.parametrize("seed", range(25))
def test_rows_attend_to_what_plain_lists_say(seed: int, sequences: int) -> None:
    twins = Twins(seed, sequences)
    for _ in range(4 * sequences):
        twins.prompt()
        for _ in range(20):
            acts = [twins.tree, twins.commit, twins.release, twins.prompt, twins.truncate]
            twins.dice.choices(acts, [4, 6, 1, 0.6, 0.1])[0]()
        twins.free()
    assert twins.joined_before_the_end
    assert twins.longest_path > 2
    assert twins.most_sequences == sequences
    assert sequences > 1 or twins.most_ranges > FEW_RANGES // 2


def test_wide_batches_of_scattered_sequences_are_masked_alike() -> None:
    dice, table, naive = random.Random(1), SlotTable(1024), [Naive(), Naive()]
    slots = list(range(1024))
    for first in range(0, 1024, 16):  # many short ranges, and a few that are longer
        slots[first : first + 8] = dice.sample(slots[first : first + 8], 8)
    for one, sequence in zip(naive, (5, 9), strict=True):
        prompt, slots = slots[:200], slots[200:]
        rows = [Row(1, slot, NO_SLOT, position, sequence) for position, slot in enumerate(prompt)]
        wanted = [one.allocate(row, True) for row in rows]
        batch = table.allocate(rows, True)
        assert len(batch.canonical[0]) > FEW_RANGES
        assert [row.nonzero()[0].tolist() for row in visible_slots(batch)] == [sorted(seen) for seen in wanted]
    rows = []
    for index, slot in enumerate(slots[: 2 * FEW_SLOTS]):
        parent = naive[index % 2].canonical[-1 - index % 7]
        rows.append(Row(1, slot, parent, 200 - index % 7, (5, 9)[index % 2]))
    wanted = [naive[index % 2].allocate(row, False) for index, row in enumerate(rows)]
    assert [row.nonzero()[0].tolist() for row in visible_slots(table.allocate(rows))] == [
        sorted(seen) for seen in wanted
    ]


def test_ancestors_that_became_canonical_are_kept_no_longer() -> None:
    table = SlotTable(CAPACITY)
    table.allocate([Row(1, 7, NO_SLOT, 0)], canonical=True)
    for position in range(1, 20):
        batch = table.allocate([Row(1, 7 + position, 6 + position, position)])
        assert (batch.prefix.tolist(), batch.ancestors.tolist()) == ([position], [7 + position])
        table.allocate([Row(1, 30 + position % 2, 7 + position, position + 1)])
        table.apply([SlotOp(SlotOpKind.COMMIT, 7 + position, 1, position)])
        batch = table.allocate([Row(1, 40, 30 + position % 2, position + 2)])
        assert (batch.prefix.tolist(), batch.ancestors.tolist()) == ([position + 1], [30 + position % 2, 40])
        table.apply([SlotOp(SlotOpKind.RELEASE, slot, 1) for slot in (30 + position % 2, 40)])
    assert [ranges.tolist() for ranges in batch.canonical] == [[[7, 20]]]


def test_a_batch_is_not_changed_by_later_commits() -> None:
    table = SlotTable(CAPACITY)
    batch = table.allocate([Row(1, 0, NO_SLOT, 0), Row(1, 1, NO_SLOT, 1)], canonical=True)
    table.allocate([Row(1, 2, NO_SLOT, 2)], canonical=True)
    assert [ranges.tolist() for ranges in batch.canonical] == [[[0, 2]]]


def test_ranges_are_slots_in_order() -> None:
    assert slots_of(np.array([[4, 2], [1, 1], [7, 3]])).tolist() == [4, 5, 1, 7, 8, 9]
    assert slots_of(np.array([[4, 1], [1, 1]])).tolist() == [4, 1]
    assert slots_of(np.array([[4, 3]])).tolist() == [4, 5, 6]
    assert slots_of(np.zeros((0, 2), np.int64)).tolist() == []


def test_a_text_in_order_is_causal() -> None:
    assert np.array_equal(visible_slots(batch_in_order([5, 6, 7])), np.tri(3, dtype=np.bool_))
    assert np.array_equal(visible_slots(batch_in_order([6, 7], 1)), np.tri(3, dtype=np.bool_)[1:])
