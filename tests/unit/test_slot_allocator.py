from __future__ import annotations

import pytest

from kvbuffers.slot_allocator import SlotAllocator
from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.protocol import MAX_OPS, SlotOp, SlotOpKind

CLEAR = SlotOp(SlotOpKind.CLEAR)


def fresh(accepted: int = 4, speculative: int = 4) -> SlotAllocator:
    """A ledger whose CLEAR has left."""
    ledger = SlotAllocator(accepted, speculative)
    assert ledger.operations() == (CLEAR,)
    return ledger


def test_slots_are_lent_lowest_first() -> None:
    ledger = fresh()
    assert ledger.lease(3) == [0, 1, 2]
    assert ledger.lease(1) == [3]
    assert ledger.counts() == (4, 4, 0)
    ledger.check()


def test_neighbours_share_one_operation() -> None:
    ledger = fresh(8, 8)
    ledger.lease(8)
    for slot in (0, 1, 2, 5):
        ledger.commit(slot)
    for slot in (7, 3, 6):
        ledger.release(slot)
    assert ledger.operations() == (
        SlotOp(SlotOpKind.COMMIT, 0, 3, 0),
        SlotOp(SlotOpKind.COMMIT, 5, 1, 3),
        SlotOp(SlotOpKind.RELEASE, 3, 1),
        SlotOp(SlotOpKind.RELEASE, 6, 2),
    )
    assert ledger.operations() == ()
    ledger.check()


def test_a_commit_after_a_lower_slot_begins_a_new_range() -> None:
    ledger = fresh()
    ledger.lease(3)
    ledger.commit(1)
    ledger.commit(0)
    assert [(op.slot, op.length, op.position) for op in ledger.operations()] == [(1, 1, 0), (0, 1, 1)]


def test_a_slot_is_used_again_in_the_run_that_releases_it() -> None:
    ledger = fresh()
    ledger.lease(2)
    ledger.release(0)
    assert ledger.counts() == (7, 1, 0)
    assert ledger.operations() == (SlotOp(SlotOpKind.RELEASE, 0, 1),)
    assert ledger.lease(1) == [0]


def test_not_before_its_release_has_left() -> None:
    ledger = fresh()
    ledger.lease(2)
    ledger.release(0)
    assert ledger.lease(1) == [2]


def test_room_is_bounded_by_guesses_and_by_slots() -> None:
    ledger = fresh(4, 2)
    assert ledger.room() == 2
    ledger.lease(1)
    assert ledger.room() == 1
    ledger.lease(2)  # the tree's root may go beyond
    assert ledger.room() == 0
    ledger.commit(0)
    ledger.release(1)
    assert ledger.room() == 1


def test_a_full_ledger_refuses() -> None:
    ledger = fresh(1, 1)
    ledger.lease(2)
    with pytest.raises(LocalProtocolError, match="1 slots wanted, 0 of 2 are free"):
        ledger.lease(1)


def test_prefill_extends_the_canonical_sequence() -> None:
    ledger = fresh()
    ledger.prompt_rows((7, 8, 9))
    assert (ledger.length, ledger.counts(), ledger.operations()) == (3, (5, 0, 3), ())
    ledger.lease(1)
    ledger.commit(3)
    assert ledger.operations() == (SlotOp(SlotOpKind.COMMIT, 3, 1, 3),)


def test_clear_forgets_everything_and_says_so_first() -> None:
    ledger = fresh()
    ledger.prompt_rows((7, 8))
    ledger.lease(2)
    ledger.release(2)
    ledger.clear()
    assert (ledger.counts(), ledger.length, ledger.operations()) == ((8, 0, 0), 0, (CLEAR,))
    ledger.check()


def test_releases_that_do_not_fit_wait_and_so_do_their_slots() -> None:
    ledger = fresh(0, 2 * MAX_OPS + 2)
    slots = ledger.lease(2 * MAX_OPS + 2)
    for slot in slots[::2]:
        ledger.release(slot)
    assert ledger.room() == MAX_OPS
    assert len(ledger.operations()) == MAX_OPS
    assert ledger.room() == MAX_OPS + 1
    ledger.check()
    assert ledger.operations() == (SlotOp(SlotOpKind.RELEASE, slots[-2], 1),)


@pytest.mark.parametrize(("field", "slot"), [("_leased", 7), ("_canonical", 0)])
def test_a_contradiction_is_found(field: str, slot: int) -> None:
    ledger = fresh()
    ledger.lease(1)
    getattr(ledger, field).add(slot)
    with pytest.raises(AssertionError):
        ledger.check()


def test_a_lost_slot_is_found() -> None:
    ledger = fresh()
    ledger._leased.discard(ledger.lease(1)[0])
    with pytest.raises(AssertionError, match="lost"):
        ledger.check()
