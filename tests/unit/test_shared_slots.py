"""Slots that several sequences share: forks, cached prefixes, and the allocator with a table that follows it."""

from __future__ import annotations

import random

import pytest

from kvbuffers.slot_allocator import SlotAllocator
from kvbuffers.slot_table import SlotTable
from pipeinfer.core.errors import LocalProtocolError, RemoteProtocolError
from pipeinfer.core.messages import MAX_KEPT, MAX_OPS, NO_SLOT, Row, SlotOp, SlotOpKind

S, T, U = 3, 4, 5
"""Sequences."""


def fork(sequence: int, source: int, length: int) -> SlotOp:
    return SlotOp(SlotOpKind.FORK, source, length, 0, sequence)


def free(sequence: int) -> SlotOp:
    return SlotOp(SlotOpKind.FREE, sequence=sequence)


def prompted(length: int = 4, capacity: int = 16) -> SlotAllocator:
    """An allocator whose sequence S has slots 0 to ``length`` - 1."""
    allocator = SlotAllocator(capacity - 4, 4)
    allocator.prompt_rows(S, [7] * length)
    return allocator


def table() -> SlotTable:
    """A table whose sequence S has slots 0 to 3."""
    found = SlotTable(16)
    found.allocate([Row(7, index, NO_SLOT, index, S) for index in range(4)], canonical=True)
    return found


def test_a_fork_shares_slots_and_they_are_free_when_nobody_has_them() -> None:
    allocator = prompted()
    allocator.fork(T, S, 3)
    assert (allocator.length(T), allocator.counts(), allocator.held(S), allocator.held(T)) == (3, (12, 0, 4), 1, 0)
    assert allocator.prompt_rows(T, [8]) == ((fork(T, S, 3),), [Row(8, 4, NO_SLOT, 3, T)])
    allocator.free(S)
    assert (allocator.counts(), allocator.held(T), allocator.free_slots()) == ((12, 0, 4), 4, 12)
    assert (allocator.operations(), allocator.lease(U, 1)) == ((free(S),), [3])
    allocator.free(T)
    allocator.check()
    assert (allocator.counts(), allocator.operations()) == ((15, 1, 0), (free(T),))


def test_a_fork_leaves_after_the_commits_that_it_shares() -> None:
    allocator = prompted()
    (slot,) = allocator.lease(S, 1)
    allocator.commit(S, slot)
    allocator.fork(T, S, 5)
    assert allocator.operations() == (SlotOp(SlotOpKind.COMMIT, slot, 1, 4, S), fork(T, S, 5))


def test_a_source_that_is_over_at_once_is_freed_after_its_fork() -> None:
    allocator = prompted()
    allocator.fork(T, S, 4)
    allocator.free(S)
    assert (allocator.held(T), allocator.operations()) == (4, (fork(T, S, 4), free(S)))
    allocator.check()


def test_a_fork_that_is_over_before_it_has_left_is_never_heard_of() -> None:
    allocator = prompted()
    allocator.fork(T, S, 4)
    allocator.free(T)
    assert (allocator.operations(), allocator.held(S)) == ((), 4)
    allocator.fork(T, S, 4)
    allocator.fork(U, T, 2)
    allocator.free(T)
    assert allocator.operations() == (fork(T, S, 4), fork(U, T, 2), free(T)), "another one was forked from it"
    allocator.check()


def test_a_retired_sequence_keeps_its_canonical_slots() -> None:
    allocator = prompted()
    allocator.lease(S, 3)
    allocator.lease(T, 1)
    assert allocator.held(S) == 7
    allocator.retire(S)
    allocator.retire(U)
    assert (allocator.held(S), allocator.counts(), allocator.length(S)) == (4, (11, 1, 4), 4)
    assert allocator.operations() == (SlotOp(SlotOpKind.RELEASE, 4, 3, 0, S),)
    allocator.check()


def test_a_truncated_sequence_keeps_its_first_slots() -> None:
    allocator = prompted()
    allocator.fork(T, S, 3)
    allocator.lease(S, 2)
    allocator.release(S, 5)
    allocator.truncate(S, 1)
    assert (allocator.length(S), allocator.length(T), allocator.held(T)) == (1, 3, 2)
    assert allocator.counts() == (13, 0, 3)
    assert allocator.operations() == (fork(T, S, 3), SlotOp(SlotOpKind.TRUNCATE, 0, 1, 0, S))
    allocator.check()


def test_a_reserve_is_no_room_for_guesses() -> None:
    allocator = SlotAllocator(4, 4)
    assert (allocator.room(4), allocator.room(6), allocator.room(9)) == (4, 2, 0)
    allocator.prompt_rows(S, [7] * 6)
    assert (allocator.free_slots(), allocator.room(), allocator.room(1), allocator.room(2)) == (2, 2, 1, 0)
    allocator.free(S)
    assert (allocator.free_slots(), allocator.room(5)) == (8, 3), "those that are freed count"


@pytest.mark.parametrize("damage", ["shared", "canonical"])
def test_a_wrong_count_of_sequences_is_found(damage: str) -> None:
    allocator = prompted()
    allocator.fork(T, S, 3)
    if damage == "shared":
        allocator._shared[0] = 3
    else:
        allocator._canonical[T].pop()
    with pytest.raises(AssertionError):
        allocator.check()


def test_a_fork_and_a_cut_must_fit() -> None:
    allocator = prompted()
    for sequence, source, length in ((T, S, 0), (T, S, 5), (T, U, 1), (S, S, 1)):
        with pytest.raises(LocalProtocolError):
            allocator.fork(sequence, source, length)
    for sequence, length in ((S, 5), (S, -1), (U, 0)):
        with pytest.raises(LocalProtocolError):
            allocator.truncate(sequence, length)
    assert (allocator.operations(), allocator.length(T)) == ((), 0)


def test_the_length_of_an_operation_has_16_bits() -> None:
    allocator = prompted(MAX_KEPT + 1, 1 << 17)
    allocator.fork(T, S, MAX_KEPT)
    for act in (lambda: allocator.fork(U, S, MAX_KEPT + 1), lambda: allocator.truncate(S, MAX_KEPT + 1)):
        with pytest.raises(LocalProtocolError):
            act()


def test_where_operations_do_not_fit_forks_leave_first_and_commits_wait() -> None:
    allocator = SlotAllocator(100, 2 * MAX_OPS + 200)
    rows = {name: allocator.lease(name, 2) for name in range(10, 11 + MAX_OPS)}
    for name, slots in rows.items():
        allocator.commit(name, slots[0])
    last = max(rows)
    allocator.fork(T, last, 1)
    allocator.free(12)
    first = allocator.operations()
    assert (len(first), [op.kind for op in first[:2]]) == (MAX_OPS, [SlotOpKind.COMMIT, SlotOpKind.FORK])
    assert {op.sequence for op in first[:2]} == {last, T}
    allocator.check()
    rest = allocator.operations()
    assert [op.kind for op in rest] == [SlotOpKind.COMMIT, SlotOpKind.FREE]
    assert allocator.lease(U, 2) == rows[12], "what is freed waits for its operation"
    for name in rows:
        if name != 12:
            allocator.fork(name + 10_000, name, 1)
    allocator.fork(U + 1, last, 1)
    with pytest.raises(LocalProtocolError, match="forks need more"):
        allocator.operations()


def test_a_forked_sequence_sees_what_it_shares_and_its_own() -> None:
    shard = table()
    shard.apply([fork(T, S, 3)])
    batch = shard.allocate([Row(8, 9, NO_SLOT, 3, T), Row(8, 5, NO_SLOT, 4, S)])
    assert [ranges.tolist() for ranges in batch.canonical] == [[[0, 3]], [[0, 4]]]
    assert (shard.counts(), shard.length(T)) == ((10, 2, 4), 3)
    shard.apply([free(S)])
    assert shard.counts() == (12, 1, 3), "slot 3 was not shared"
    shard.check()
    shard.apply([free(T)])
    assert shard.counts() == (16, 0, 0)
    shard.check()


@pytest.mark.parametrize(
    "ops",
    [
        [fork(T, S, 5)],  # more than there is
        [fork(T, S, 0)],
        [fork(T, U, 1)],  # of nothing
        [fork(S, S, 2)],  # of itself
        [fork(T, S, 1), fork(T, S, 1)],  # twice
        [fork(T, S, 2), SlotOp(SlotOpKind.RELEASE, 1, 1, 0, T)],  # a shared slot
    ],
    ids=str,
)
def test_forks_no_correct_leader_asks_for(ops: list[SlotOp]) -> None:
    with pytest.raises(RemoteProtocolError):
        table().apply(ops)


class Model:
    """An allocator and a table that follows it, led by dice, and the same as plain lists: of each sequence its
    canonical slots, and its leased ones with their positions."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.capacity = self.dice.choice((24, 150))
        self.allocator, self.table = SlotAllocator(self.capacity - 8, 8), SlotTable(self.capacity)
        self.canonical: dict[int, list[int]] = {}
        self.leased: dict[int, dict[int, int]] = {}
        self.begun = self.most_shared = 0

    def any(self) -> int:
        return self.dice.choice([*self.canonical])

    def begin(self) -> int:
        self.begun += 1
        self.canonical[self.begun], self.leased[self.begun] = [], {}
        return self.begun

    def used(self) -> set[int]:
        return {slot for of in (self.canonical, self.leased) for slots in of.values() for slot in slots}

    def prompt(self) -> None:
        sequence = self.begin() if not self.canonical or self.dice.random() < 0.3 else self.any()
        count = min(self.dice.randint(1, 9), self.allocator.free_slots())
        if not count:
            return
        ops, rows = self.allocator.prompt_rows(sequence, [1] * count)
        self.table.apply(ops)
        self.write(rows, canonical=True)

    def run(self) -> None:
        room = self.allocator.room(self.dice.choice((0, 0, 5)))
        self.table.apply(self.allocator.operations())
        sequence, count = self.any(), self.dice.randint(0, room)
        rows = []
        for slot in self.allocator.lease(sequence, count):
            places = dict(enumerate(self.canonical[sequence][-1:], len(self.canonical[sequence]) - 1))
            above = {slot: place for place, slot in places.items()} | self.leased[sequence]
            above |= {row.slot: row.position for row in rows}
            parent = self.dice.choice([*above]) if above else NO_SLOT
            rows.append(Row(1, slot, parent, above.get(parent, -1) + 1, sequence))
        self.write(rows, canonical=False)

    def write(self, rows: list[Row], canonical: bool) -> None:
        for row in rows:
            assert row.slot not in self.used(), "a slot is handed out twice"
            if canonical:
                self.canonical[row.sequence].append(row.slot)
            else:
                self.leased[row.sequence][row.slot] = row.position
        if rows:
            self.table.allocate(rows, canonical)

    def commit(self) -> None:
        sequence = self.any()
        place = len(self.canonical[sequence])
        if found := [slot for slot, position in self.leased[sequence].items() if position == place]:
            slot = self.dice.choice(found)
            self.allocator.commit(sequence, slot)
            self.canonical[sequence].append(slot)
            del self.leased[sequence][slot]

    def release(self) -> None:
        sequence = self.any()
        if self.dice.random() < 0.2:
            self.allocator.retire(sequence)
            self.leased[sequence] = {}
        else:  # all at and below some depth, as descendants die with their ancestors
            least = self.dice.randint(0, 60)
            dead = [slot for slot, position in self.leased[sequence].items() if position >= least]
            self.allocator.release(sequence, *dead)
            for slot in dead:
                del self.leased[sequence][slot]

    def fork(self) -> None:
        source = self.any()
        if length := len(self.canonical[source]):
            count, sequence = self.dice.randint(1, length), self.begin()
            self.allocator.fork(sequence, source, count)
            self.canonical[sequence] = self.canonical[source][:count]

    def truncate(self) -> None:
        sequence = self.any()
        if self.allocator._canonical.get(sequence) is not None:
            count = self.dice.randint(0, len(self.canonical[sequence]))
            self.allocator.truncate(sequence, count)
            self.canonical[sequence], self.leased[sequence] = self.canonical[sequence][:count], {}

    def free(self) -> None:
        sequence = self.any()
        self.allocator.free(sequence)
        del self.canonical[sequence], self.leased[sequence]

    def compare(self) -> None:
        self.allocator.check()
        holders: dict[int, int] = {}
        for slots in self.canonical.values():
            for slot in slots:
                holders[slot] = holders.get(slot, 0) + 1
        self.most_shared = max(self.most_shared, *holders.values(), 0)
        leased = sum(map(len, self.leased.values()))
        assert self.allocator.counts() == (self.capacity - leased - len(holders), leased, len(holders))
        for sequence, slots in self.canonical.items():
            assert self.allocator._canonical.get(sequence, []) == slots
            own = sum(holders[slot] == 1 for slot in slots) + len(self.leased[sequence])
            assert self.allocator.held(sequence) == own
        coming = self.allocator.free_slots()
        self.table.apply(self.allocator.operations())
        assert len(self.allocator._free) == coming
        self.table.check()
        assert self.table.counts() == self.allocator.counts()
        for sequence, slots in self.canonical.items():
            state = self.table._sequences.get(sequence)
            assert (list(state.canonical) if state else []) == slots
            assert (set(state.leased) if state else set()) == set(self.leased[sequence])


@pytest.mark.parametrize("seed", range(30))
def test_allocator_and_table_agree_with_plain_lists(seed: int) -> None:
    """The seed is the test's parameter."""
    model = Model(seed)
    model.prompt()
    for _ in range(250):
        acts = [model.prompt, model.run, model.commit, model.release, model.fork, model.truncate, model.free]
        model.dice.choices(acts, [2, 4, 6, 1, 1, 0.3, 0.9])[0]()
        if not model.canonical:
            model.prompt()
        if model.dice.random() < 0.5:
            model.compare()
    assert model.most_shared > 1
