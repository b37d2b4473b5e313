from __future__ import annotations

import pytest

from kvbuffers.slot_allocator import SlotAllocator
from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.messages import MAX_OPS, NO_SLOT, Row, SlotOp, SlotOpKind

S = 3
"""The sequence of most tests."""


def commit(slot: int, length: int, position: int, sequence: int = S) -> SlotOp:
    return SlotOp(SlotOpKind.COMMIT, slot, length, position, sequence)


def release(slot: int, length: int, sequence: int = S) -> SlotOp:
    return SlotOp(SlotOpKind.RELEASE, slot, length, 0, sequence)


def free(sequence: int = S) -> SlotOp:
    return SlotOp(SlotOpKind.FREE, sequence=sequence)


def fresh(accepted: int = 4, speculative: int = 4) -> SlotAllocator:
    allocator = SlotAllocator(accepted, speculative)
    assert allocator.operations() == ()
    return allocator


def test_slots_are_lent_lowest_first() -> None:
    allocator = fresh()
    assert allocator.lease(S, 3) == [0, 1, 2]
    assert allocator.lease(S, 1) == [3]
    assert allocator.counts() == (4, 4, 0)
    allocator.check()


def test_neighbours_share_one_operation() -> None:
    allocator = fresh(8, 8)
    allocator.lease(S, 8)
    for slot in (0, 1, 2, 5):
        allocator.commit(S, slot)
    for slot in (7, 3, 6):
        allocator.release(S, slot)
    assert allocator.operations() == (
        commit(0, 3, 0),
        commit(5, 1, 3),
        release(3, 1),
        release(6, 2),
    )
    assert allocator.operations() == ()
    allocator.check()


def test_a_commit_after_a_lower_slot_begins_a_new_range() -> None:
    allocator = fresh()
    allocator.lease(S, 3)
    allocator.commit(S, 1)
    allocator.commit(S, 0)
    assert [(op.slot, op.length, op.position) for op in allocator.operations()] == [(1, 1, 0), (0, 1, 1)]


def test_a_slot_is_used_again_in_the_run_that_releases_it() -> None:
    allocator = fresh()
    allocator.lease(S, 2)
    allocator.release(S, 0)
    assert allocator.counts() == (7, 1, 0)
    assert allocator.operations() == (release(0, 1),)
    assert allocator.lease(S, 1) == [0]


def test_not_before_its_release_has_left() -> None:
    allocator = fresh()
    allocator.lease(S, 2)
    allocator.release(S, 0)
    assert allocator.lease(S, 1) == [2]


def test_room_is_bounded_by_guesses_and_by_slots() -> None:
    allocator = fresh(4, 2)
    assert allocator.room() == 2
    allocator.lease(S, 1)
    assert allocator.room() == 1
    allocator.lease(S, 2)  # the tree's root may go beyond
    assert allocator.room() == 0
    allocator.commit(S, 0)
    allocator.release(S, 1)
    assert allocator.room() == 1


def test_a_full_allocator_refuses() -> None:
    allocator = fresh(1, 1)
    allocator.lease(S, 2)
    with pytest.raises(LocalProtocolError, match="1 slots wanted, 0 of 2 are free"):
        allocator.lease(S, 1)


def test_prefill_extends_the_canonical_sequence() -> None:
    allocator = fresh()
    allocator.prompt_rows(S, (7, 8, 9))
    assert (allocator.length(S), allocator.counts(), allocator.operations()) == (3, (5, 0, 3), ())
    allocator.lease(S, 1)
    allocator.commit(S, 3)
    assert allocator.operations() == (commit(3, 1, 3),)


def test_to_free_a_sequence_is_said_once_and_nothing_else_of_it() -> None:
    allocator = fresh()
    allocator.prompt_rows(S, (7, 8))
    allocator.lease(S, 3)
    allocator.commit(S, 2)
    allocator.release(S, 3)
    allocator.free(S)
    assert (allocator.counts(), allocator.length(S), allocator.room()) == ((8, 0, 0), 0, 4)
    allocator.check()
    assert allocator.prompt_rows(S + 1, (7,)) == ((free(),), [Row(7, 0, NO_SLOT, 0, S + 1)])
    allocator.check()


def test_a_sequence_that_never_had_a_slot_is_not_freed() -> None:
    allocator = fresh()
    allocator.free(S)
    assert allocator.operations() == ()
    allocator.lease(S, 1)
    allocator.release(S, 0)
    assert allocator.operations() == (release(0, 1),)
    allocator.free(S)
    allocator.free(S)
    assert allocator.operations() == (free(),)


def test_slots_of_a_freed_sequence_wait_for_the_next_run() -> None:
    allocator = fresh(1, 1)
    allocator.lease(S, 2)
    allocator.free(S)
    with pytest.raises(LocalProtocolError, match="0 of 2 are free"):
        allocator.lease(S, 1)
    assert allocator.operations() == (free(),)
    assert allocator.lease(S, 2) == [0, 1]


def test_sequences_have_slots_of_their_own() -> None:
    allocator = fresh(6, 4)
    for sequence in (1, 2):
        allocator.prompt_rows(sequence, (7,))
        allocator.lease(sequence, 2)
    assert (allocator.counts(), allocator.room()) == ((4, 4, 2), 0)
    for slot, sequence in ((1, 1), (4, 2), (2, 1)):
        allocator.commit(sequence, slot)
    allocator.release(2, 5)
    allocator.check()
    allocator.free(1)
    assert (allocator.counts(), allocator.length(1), allocator.length(2)) == ((8, 0, 2), 0, 2)
    assert allocator.operations() == (commit(4, 1, 1, 2), free(1), release(5, 1, 2))
    assert allocator.lease(2, 6) == [0, 1, 2, 5, 6, 7]
    allocator.check()


def test_operations_of_two_sequences_do_not_merge() -> None:
    allocator = fresh(4, 4)
    allocator.lease(1, 2)
    allocator.lease(2, 2)
    allocator.commit(1, 1)
    allocator.commit(2, 2)
    allocator.release(1, 0)
    allocator.release(2, 3)
    assert allocator.operations() == (commit(1, 1, 0, 1), commit(2, 1, 0, 2), release(0, 1, 1), release(3, 1, 2))
    for leased, other in ((1, 2), (2, 1)):
        (slot,) = allocator.lease(leased, 1)
        with pytest.raises(LocalProtocolError, match="not leased to"):
            allocator.release(other, slot)


def test_releases_that_do_not_fit_wait_and_so_do_their_slots() -> None:
    allocator = fresh(0, 2 * MAX_OPS + 2)
    slots = allocator.lease(S, 2 * MAX_OPS + 2)
    for slot in slots[::2]:
        allocator.release(S, slot)
    assert allocator.room() == MAX_OPS
    assert len(allocator.operations()) == MAX_OPS
    assert allocator.room() == MAX_OPS + 1
    allocator.check()
    assert allocator.operations() == (release(slots[-2], 1),)


def test_a_contradiction_is_found() -> None:
    for damage in (
        lambda allocator: allocator._leased.update({7: S}),
        lambda allocator: allocator._canonical[S].append(0),
        lambda allocator: allocator._freed.append(7),
        lambda allocator: allocator._canonical.clear(),
    ):
        allocator = fresh()
        allocator.lease(S, 1)
        damage(allocator)
        with pytest.raises(AssertionError):
            allocator.check()


def test_a_lost_slot_is_found() -> None:
    allocator = fresh()
    del allocator._leased[allocator.lease(S, 1)[0]]
    with pytest.raises(AssertionError, match="lost"):
        allocator.check()
