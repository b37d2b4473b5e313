"""What a row may see. Rows are written as (token, slot, parent, position)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvbuffers.slot_table import SlotTable
from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import NO_SLOT, Row, SlotOp, SlotOpKind
from pipeinfer.core.ports import GREEDY, Batch, Sampling
from pipeinfer.core.slots import visible_slots

PENALISED = Sampling(repetition_penalty=1.25)


def commit(slot: int, position: int, length: int = 1) -> SlotOp:
    return SlotOp(SlotOpKind.COMMIT, slot, length, position)


def release(slot: int, length: int = 1) -> SlotOp:
    return SlotOp(SlotOpKind.RELEASE, slot, length)


def seen(batch: Batch) -> list[list[int]]:
    return [[int(slot) for slot in row.nonzero()[0]] for row in visible_slots(batch)]


def prompted(tokens: int = 3, capacity: int = 12) -> SlotTable:
    """A table whose canonical sequence is slots 0, 1, 2."""
    table = SlotTable(capacity)
    table.allocate([Row(9, index, NO_SLOT, index) for index in range(tokens)], canonical=True)
    return table


def test_a_prompt_is_causal() -> None:
    table = SlotTable(8)
    assert seen(table.allocate([Row(1, i, NO_SLOT, i) for i in range(3)], canonical=True)) == [[0], [0, 1], [0, 1, 2]]
    assert seen(table.allocate([Row(1, 4, NO_SLOT, 3)], canonical=True)) == [[0, 1, 2, 4]]
    assert table.counts() == (4, 0, 4)
    table.check()


def test_a_chain_sees_the_canonical_slots_and_its_ancestors() -> None:
    batch = prompted().allocate([Row(1, 3, NO_SLOT, 3), Row(2, 4, 3, 4), Row(3, 5, 4, 5)])
    assert seen(batch) == [[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert batch.tokens.tolist() == [1, 2, 3]
    assert batch.positions.tolist() == [3, 4, 5]
    assert batch.slots.tolist() == [3, 4, 5]


def test_siblings_do_not_see_each_other() -> None:
    batch = prompted().allocate([Row(1, 3, NO_SLOT, 3), Row(2, 5, 3, 4), Row(3, 4, 3, 4), Row(4, 7, 4, 5)])
    assert seen(batch) == [[0, 1, 2, 3], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 7]]


def test_a_tree_grows_over_several_runs() -> None:
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3), Row(2, 4, 3, 4)])
    assert seen(table.allocate([Row(3, 6, 4, 5), Row(4, 5, 3, 4)])) == [[0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 5]]


def test_a_commit_shows_a_slot_to_everybody_later() -> None:
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3), Row(2, 4, 3, 4)])
    table.apply([commit(3, 3)])
    assert table.length() == 4
    assert seen(table.allocate([Row(5, 6, 3, 4)])) == [[0, 1, 2, 3, 6]]
    table.check()


def test_a_row_that_joins_before_the_end_sees_no_canonical_slot_beyond() -> None:
    """Its token may be the canonical one, verified once more, or one that has lost: both see what they were told."""
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3), Row(2, 4, 3, 4), Row(3, 5, 4, 5), Row(4, 6, 3, 4)])
    table.apply([commit(3, 3, length=2)])
    batch = table.allocate([Row(2, 7, 3, 4), Row(5, 8, 7, 5), Row(6, 9, 6, 5), Row(7, 10, 5, 6), Row(8, 11, 1, 2)])
    assert seen(batch) == [
        [0, 1, 2, 3, 7],
        [0, 1, 2, 3, 7, 8],
        [0, 1, 2, 3, 6, 9],
        [0, 1, 2, 3, 4, 5, 10],
        [0, 1, 11],
    ]


def test_a_released_slot_is_seen_by_nobody_and_used_again() -> None:
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3), Row(2, 4, NO_SLOT, 3)])
    table.apply([commit(3, 3), release(4)])
    assert seen(table.allocate([Row(3, 4, 3, 4)])) == [[0, 1, 2, 3, 4]]
    assert table.counts() == (7, 1, 4)


def test_to_free_a_sequence_frees_all_its_slots_and_no_other() -> None:
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3), Row(1, 7, NO_SLOT, 0, 5)])
    table.apply([SlotOp(SlotOpKind.FREE)])
    assert (table.counts(), table.length()) == ((11, 1, 0), 0)
    assert seen(table.allocate([Row(1, 5, NO_SLOT, 0)], canonical=True)) == [[5]]
    table.apply([SlotOp(SlotOpKind.FREE, sequence=5), SlotOp(SlotOpKind.FREE, sequence=6)])
    assert table.counts() == (11, 0, 1)
    table.check()


def test_to_truncate_a_sequence_keeps_its_first_positions() -> None:
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3), Row(1, 7, NO_SLOT, 0, 5)])
    batch = table.allocate([Row(1, 4, 3, 4)])
    table.apply([SlotOp(SlotOpKind.TRUNCATE, length=2)])
    assert (table.counts(), table.length()) == ((9, 1, 2), 2)
    assert seen(batch) == [[0, 1, 2, 3, 4]], "what a batch says is not changed"
    assert seen(table.allocate([Row(1, 4, NO_SLOT, 2), Row(1, 2, 0, 1)])) == [[0, 1, 4], [0, 2]]
    table.apply([SlotOp(SlotOpKind.TRUNCATE), SlotOp(SlotOpKind.TRUNCATE, sequence=6)])
    assert table.counts() == (11, 1, 0)
    table.check()


def test_rows_of_several_sequences_see_their_own() -> None:
    table = prompted()
    table.allocate([Row(8, 3 + index, NO_SLOT, index, 1) for index in range(2)], canonical=True)
    rows = [Row(1, 5, NO_SLOT, 2, 1), Row(2, 6, NO_SLOT, 3), Row(3, 7, 5, 3, 1), Row(4, 8, NO_SLOT, 0, 2)]
    batch = table.allocate(rows)
    assert seen(batch) == [[3, 4, 5], [0, 1, 2, 6], [3, 4, 5, 7], [8]]
    assert batch.sequence.tolist() == [0, 1, 0, 2]
    draw = table.draw([PENALISED] * 2, batch, (1, 2))
    assert [tokens.tolist() for tokens in draw.seen] == [[2, 9], [1, 3, 8]]
    table.apply([commit(6, 3), SlotOp(SlotOpKind.COMMIT, 5, 1, 2, 1), SlotOp(SlotOpKind.RELEASE, 7, 1, 0, 1)])
    assert (table.length(), table.length(1), table.length(2), table.counts()) == (4, 3, 0, (4, 1, 7))
    table.check()


def test_a_row_lives_by_parents_of_its_own_sequence() -> None:
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3), Row(1, 4, NO_SLOT, 0, 1)])
    rows = [Row(2, 5, 3, 4, 1), Row(2, 6, 0, 1, 1), Row(2, 7, 4, 1, 1), Row(2, 8, 7, 2), Row(2, 9, NO_SLOT, 0, 2)]
    assert table.living(rows) == (2, 4)


def test_a_range_of_operations_is_applied_slot_by_slot() -> None:
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3), Row(2, 4, 3, 4), Row(3, 5, 3, 4), Row(4, 6, 5, 5)])
    table.apply([commit(3, 3, length=2), release(5, length=2)])
    assert (table.length(), table.counts()) == (5, (7, 0, 5))


def test_rows_of_a_missing_ancestor_are_not_living() -> None:
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3)])
    rows = [Row(2, 4, 3, 4), Row(3, 5, 9, 5), Row(4, 6, 5, 6), Row(5, 7, 4, 5), Row(6, 8, 2, 3), Row(7, 10, NO_SLOT, 3)]
    assert table.living(rows) == (0, 3, 4, 5)


def test_rows_at_dead_slots_and_all_below_them_are_not_living() -> None:
    rows = [Row(2, 4, NO_SLOT, 3), Row(3, 5, 4, 4), Row(4, 6, 5, 5), Row(5, 7, 4, 4)]
    assert prompted().living(rows, {5}) == (0, 3)
    assert prompted().living(rows, {4, 5}) == ()
    assert prompted().living(rows, {9}) == (0, 1, 2, 3)


def test_a_draw_is_for_the_token_after_its_row() -> None:
    table = prompted()
    batch = table.allocate([Row(1, 3, NO_SLOT, 3), Row(2, 4, 3, 4)])
    draw = table.draw([Sampling(0.5)] * 2, batch, (1, 0), is_guess=True)
    assert (draw.positions.tolist(), draw.seen, draw.is_guess) == ([5, 4], (), True)


def test_a_penalty_sees_what_the_row_sees_each_token_once() -> None:
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3), Row(2, 4, NO_SLOT, 3)])
    batch = table.allocate([Row(1, 5, 3, 4), Row(8, 6, 4, 4), Row(7, 7, 2, 3)])
    draw = table.draw([PENALISED] * 3, batch, (0, 1, 2))
    assert [tokens.tolist() for tokens in draw.seen] == [[1, 9], [2, 8, 9], [7, 9]]


def test_only_penalised_rows_say_what_they_see() -> None:
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3), Row(2, 4, NO_SLOT, 3)])
    batch = table.allocate([Row(1, 5, 3, 4), Row(8, 6, 4, 4), Row(7, 7, 2, 3)])
    samplings = (Sampling(0.5), PENALISED, GREEDY)
    draw = table.draw(samplings, batch, (2, 1, 0))
    assert (draw.samplings, draw.positions.tolist()) == (samplings, [4, 5, 5])
    assert [tokens.tolist() for tokens in draw.seen] == [[], [2, 8, 9], []]
    assert all(tokens.dtype == np.int64 for tokens in draw.seen)
    some = draw.of([2, 1])
    assert (some.samplings, some.positions.tolist()) == (samplings[:0:-1], [5, 5])
    assert [tokens.tolist() for tokens in some.seen] == [[], [2, 8, 9]]
    assert draw.of([]).seen == table.draw((), batch, ()).seen == ()


def test_what_was_generated_begins_behind_the_request_s_prompt() -> None:
    """In order and with repeats, of penalised rows alone; the rest of a row's text is not counted."""
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3), Row(2, 4, NO_SLOT, 3)])
    batch = table.allocate([Row(1, 5, 3, 4), Row(8, 6, 4, 4), Row(7, 7, 2, 3)])
    counted, early = Sampling(presence_penalty=0.5, prompt_length=3), Sampling(frequency_penalty=0.5, prompt_length=2)
    draw = table.draw((counted, early, replace(PENALISED, prompt_length=3)), batch, (0, 1, 2))
    assert [tokens.tolist() for tokens in draw.generated] == [[1, 1], [9, 2, 8], []]
    assert [tokens.tolist() for tokens in draw.seen] == [[], [], [7, 9]]
    both = table.draw([replace(PENALISED, frequency_penalty=0.5, prompt_length=4)], batch, (0,))
    assert [tokens.tolist() for tokens in both.generated + both.seen] == [[1], [1, 9]]
    late = table.draw([replace(counted, prompt_length=9)], batch, (0,))
    assert (late.generated[0].tolist(), late.seen) == ([], ())
    assert draw.of([1]).generated[0].tolist() == [9, 2, 8]


def test_a_slot_that_is_used_again_is_seen_with_its_new_token() -> None:
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3)])
    table.apply([release(3)])
    batch = table.allocate([Row(4, 3, NO_SLOT, 3)])
    assert table.draw([PENALISED], batch, (0,)).seen[0].tolist() == [4, 9]


def test_a_tombstones_slots_may_be_released_unleased() -> None:
    table = prompted()
    table.apply([release(7, length=3)])
    assert table.counts() == (9, 0, 3)


@pytest.mark.parametrize(
    "ops",
    [
        [commit(4, 4)],  # not the next position
        [commit(8, 3)],  # never leased
        [commit(4, 3)],  # put at another position
        [release(0)],  # canonical
        [release(11, length=2)],  # beyond the table
        [commit(3, 3), commit(3, 4)],  # twice
        [SlotOp(SlotOpKind.COMMIT, 3, 1, 0, 1)],  # of another sequence
        [SlotOp(SlotOpKind.RELEASE, 3, 1, 0, 1)],  # of another sequence
        [SlotOp(SlotOpKind.TRUNCATE, length=4)],  # to more than there is
    ],
    ids=str,
)
def test_operations_no_correct_leader_asks_for(ops: list[SlotOp]) -> None:
    table = prompted()
    table.allocate([Row(1, 3, NO_SLOT, 3), Row(2, 4, 3, 4)])
    with pytest.raises(RemoteProtocolError):
        table.apply(ops)


@pytest.mark.parametrize(
    "rows",
    [
        [Row(1, 0, NO_SLOT, 3)],  # a canonical slot
        [Row(1, 12, NO_SLOT, 3)],  # beyond the table
        [Row(1, 4, NO_SLOT, 3), Row(1, 4, NO_SLOT, 3)],  # twice
        [Row(1, 4, NO_SLOT, 5)],  # leaves a gap
        [Row(1, 4, 1, 3)],  # not the position after its parent's
        [Row(1, 4, NO_SLOT, 2)],  # whoever names no parent goes on at the end
        [Row(1, 4, 8, 4)],  # its parent is free
        [Row(1, 4, NO_SLOT, 3), Row(1, 5, 4, 5)],  # not its parent's next position
        [Row(1, 0, NO_SLOT, 0, 1)],  # a canonical slot of another sequence
        [Row(1, 4, NO_SLOT, 3), Row(1, 4, NO_SLOT, 0, 1)],  # leased to another sequence
        [Row(1, 4, 2, 3, 1)],  # its parent is of another sequence
    ],
    ids=str,
)
def test_rows_no_correct_leader_sends(rows: list[Row]) -> None:
    with pytest.raises(RemoteProtocolError):
        prompted().allocate(rows)


def test_canonical_rows_go_on_at_the_end() -> None:
    with pytest.raises(RemoteProtocolError, match="before the end"):
        prompted().allocate([Row(1, 4, 1, 2)], canonical=True)


def test_a_contradiction_is_found() -> None:
    table = prompted()
    table._sequences[0].leased[1] = 3, 3, b""
    with pytest.raises(AssertionError, match="leased and canonical"):
        table.check()
