from __future__ import annotations

import pytest

from kvbuffers.slot_allocator import SlotAllocator
from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.protocol import MAX_OPS, SlotOp, SlotOpKind

CLEAR = SlotOp(SlotOpKind.CLEAR)


def fresh(accepted: int = 4, speculative: int = 4) -> SlotAllocator:
    """A allocator whose CLEAR has left."""
    allocator = SlotAllocator(accepted, speculative)
    assert allocator.operations() == (CLEAR,)
    return allocator


def test_slots_are_lent_lowest_first() -> None:
    allocator = fresh()
    assert allocator.lease(3) == [0, 1, 2]
    assert allocator.lease(1) == [3]
    assert allocator.counts() == (4, 4, 0)
    allocator.check()


def test_neighbours_share_one_operation() -> None:
    allocator = fresh(8, 8)
    allocator.lease(8)
    for slot in (0, 1, 2, 5):
        allocator.commit(slot)
    for slot in (7, 3, 6):
        allocator.release(slot)
    assert allocator.operations() == (
        SlotOp(SlotOpKind.COMMIT, 0, 3, 0),
        SlotOp(SlotOpKind.COMMIT, 5, 1, 3),
        SlotOp(SlotOpKind.RELEASE, 3, 1),
        SlotOp(SlotOpKind.RELEASE, 6, 2),
    )
    assert allocator.operations() == ()
    allocator.check()


def test_a_commit_after_a_lower_slot_begins_a_new_range() -> None:
    allocator = fresh()
    allocator.lease(3)
    allocator.commit(1)
    allocator.commit(0)
    assert [(op.slot, op.length, op.position) for op in allocator.operations()] == [(1, 1, 0), (0, 1, 1)]


def test_a_slot_is_used_again_in_the_run_that_releases_it() -> None:
    allocator = fresh()
    allocator.lease(2)
    allocator.release(0)
    assert allocator.counts() == (7, 1, 0)
    assert allocator.operations() == (SlotOp(SlotOpKind.RELEASE, 0, 1),)
    assert allocator.lease(1) == [0]


def test_not_before_its_release_has_left() -> None:
    allocator = fresh()
    allocator.lease(2)
    allocator.release(0)
    assert allocator.lease(1) == [2]


def test_room_is_bounded_by_guesses_and_by_slots() -> None:
    allocator = fresh(4, 2)
    assert allocator.room() == 2
    allocator.lease(1)
    assert allocator.room() == 1
    allocator.lease(2)  # the tree's root may go beyond
    assert allocator.room() == 0
    allocator.commit(0)
    allocator.release(1)
    assert allocator.room() == 1


def test_a_full_ledger_refuses() -> None:
    allocator = fresh(1, 1)
    allocator.lease(2)
    with pytest.raises(LocalProtocolError, match="1 slots wanted, 0 of 2 are free"):
        allocator.lease(1)


def test_prefill_extends_the_canonical_sequence() -> None:
    allocator = fresh()
    allocator.prompt_rows((7, 8, 9))
    assert (allocator.length, allocator.counts(), allocator.operations()) == (3, (5, 0, 3), ())
    allocator.lease(1)
    allocator.commit(3)
    assert allocator.operations() == (SlotOp(SlotOpKind.COMMIT, 3, 1, 3),)


def test_clear_forgets_everything_and_says_so_first() -> None:
    allocator = fresh()
    allocator.prompt_rows((7, 8))
    allocator.lease(2)
    allocator.release(2)
    allocator.clear()
    assert (allocator.counts(), allocator.length, allocator.operations()) == ((8, 0, 0), 0, (CLEAR,))
    allocator.check()


def test_releases_that_do_not_fit_wait_and_so_do_their_slots() -> None:
    allocator = fresh(0, 2 * MAX_OPS + 2)
    slots = allocator.lease(2 * MAX_OPS + 2)
    for slot in slots[::2]:
        allocator.release(slot)
    assert allocator.room() == MAX_OPS
    assert len(allocator.operations()) == MAX_OPS
    assert allocator.room() == MAX_OPS + 1
    allocator.check()
    assert allocator.operations() == (SlotOp(SlotOpKind.RELEASE, slots[-2], 1),)


@pytest.mark.parametrize(("field", "slot"), [("_leased", 7), ("_canonical", 0)])
def test_a_contradiction_is_found(field: str, slot: int) -> None:
    allocator = fresh()
    allocator.lease(1)
    getattr(allocator, field).add(slot)
    with pytest.raises(AssertionError):
        allocator.check()


def test_a_lost_slot_is_found() -> None:
    allocator = fresh()
    allocator._leased.discard(allocator.lease(1)[0])
    with pytest.raises(AssertionError, match="lost"):
        allocator.check()
