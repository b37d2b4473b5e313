"""Runs as they leave: rows, slots, operations, and what is counted."""

from __future__ import annotations

from dataclasses import replace

from kvbuffers.slot_allocator import SlotAllocator
from pipeinfer.core.messages import NO_SLOT, Row, SlotOp, SlotOpKind, Wants
from pipeinfer.core.ports import Request
from pipeinfer.orchestrator.flight import Flight
from pipeinfer.orchestrator.launcher import Launcher
from pipeinfer.orchestrator.session import Session
from speculation.schedules.policy import CONTINUOUS
from speculation.schedules.prefill_chunks import PrefillChunks
from speculation.schedules.schedule import Launch
from speculation.trees.tree import Node


class Pad:
    """A launcher of sessions 1, 2, ... with prompts of these ``lengths``."""

    def __init__(self, *lengths: int, slots: tuple[int, int] = (40, 8), prefill_chunk: int = 4) -> None:
        self.allocator, self.flight = SlotAllocator(*slots), Flight()
        chunks = PrefillChunks(replace(CONTINUOUS, prefill_chunk=prefill_chunk))
        self.launcher = Launcher(self.allocator, self.flight, chunks)
        self.served: dict[int, Session] = {}
        for sequence, length in enumerate(lengths, 1):
            prompt = tuple(range(100 * sequence, 100 * sequence + length))
            self.served[sequence] = Session(Request(prompt, 9), sequence, sequence, list(prompt))
            self.served[sequence].begin(sequence, 50)

    def prompted(self) -> Pad:
        """All prompts have left."""
        while waiting := [one for one in self.served.values() if one.prefilled < one.prompt]:
            assert self.launcher.prompts(waiting, 0.0)
        return self

    def next_root(self, sequence: int, token: int) -> Node:
        """The target says ``token``, which nobody had guessed."""
        return self.served[sequence].tree.advance(token)[0]


def test_a_chunk_of_the_first_prompt_leaves_alone() -> None:
    pad = Pad(6, 2)
    run = pad.launcher.prompts([*pad.served.values()], 3.0)
    assert run is not None
    assert run.rows == tuple(Row(100 + index, index, NO_SLOT, index, 1) for index in range(4))
    assert (run.run, run.is_canonical, run.wants) == (1, True, Wants.NOTHING)
    assert [one.prefilled for one in pad.served.values()] == [4, 0]
    (flying,) = pad.flight
    assert (flying.prompts, flying.nodes, flying.is_prefill, flying.launched_at) == ({1: [0, 1, 2, 3]}, [], True, 3.0)
    assert pad.served[1].tree.root.slot is None


def test_the_end_of_a_prompt_takes_along_the_ends_of_others() -> None:
    pad = Pad(6, 2, 3)
    pad.launcher.prompts([*pad.served.values()], 0.0)
    run = pad.launcher.prompts([*pad.served.values()], 0.0)
    assert run is not None
    assert [(row.sequence, row.position) for row in run.rows] == [(1, 4), (1, 5), (2, 0), (2, 1)]
    assert run.wants is Wants.LAST
    last = [*pad.flight][-1]
    assert last.nodes == [pad.served[1].tree.root, pad.served[2].tree.root]
    assert [node.slot for node in last.nodes] == [run.rows[1].slot, run.rows[3].slot]
    assert [one.stats.prefill_runs for one in pad.served.values()] == [2, 1, 0]


def test_a_chunk_is_as_long_as_there_are_slots() -> None:
    pad = Pad(6, slots=(3, 0))
    run = pad.launcher.prompts([pad.served[1]], 0.0)
    assert run is not None and len(run.rows) == 3
    assert pad.launcher.prompts([pad.served[1]], 0.0) is None
    assert len(pad.flight) == 1


def test_a_chunk_leaves_the_slots_that_are_reserved() -> None:
    pad = Pad(6, 2, slots=(5, 0), prefill_chunk=8)
    run = pad.launcher.prompts([*pad.served.values()], 0.0, reserve=2)
    assert run is not None and len(run.rows) == 3
    assert pad.launcher.prompts([*pad.served.values()], 0.0, reserve=2) is None
    assert (pad.allocator.free_slots(), len(pad.flight)) == (2, 1)


def test_rows_of_nodes_are_sorted_and_each_has_its_parents_slot() -> None:
    pad = Pad(2, 2).prompted()
    two, one = pad.next_root(2, 7), pad.next_root(1, 8)
    guess = pad.served[2].tree.add(two, 9, -0.1)
    assert guess is not None
    run = pad.launcher.nodes(Launch([two, guess, one]), pad.served, 0.0)
    ends = [pad.served[sequence].text[-1] for sequence in (1, 2)]
    assert ends == [101, 201]
    assert [(row.token, row.position, row.sequence) for row in run.rows] == [(8, 2, 1), (7, 2, 2), (9, 3, 2)]
    assert [row.slot for row in run.rows] == [one.slot, two.slot, guess.slot]
    assert run.rows[2].parent == two.slot
    assert (run.is_canonical, run.wants) == (False, Wants.EVERY)


def test_a_root_is_committed_by_the_run_after_its_own() -> None:
    pad = Pad(2).prompted()
    root = pad.next_root(1, 7)
    guess = pad.served[1].tree.add(root, 9, -0.1)
    assert guess is not None
    first = pad.launcher.nodes(Launch([root]), pad.served, 0.0)
    assert (first.ops, pad.allocator.length(1)) == ((), 3)
    second = pad.launcher.nodes(Launch([guess]), pad.served, 0.0)
    assert root.slot is not None
    assert second.ops == (SlotOp(SlotOpKind.COMMIT, root.slot, 1, 2, 1),)
    assert [run.carries_root for run in pad.flight][1:] == [True, False]


def test_a_copy_has_a_slot_that_is_free_after_its_run() -> None:
    pad = Pad(2).prompted()
    root = pad.next_root(1, 7)
    pad.launcher.nodes(Launch([root]), pad.served, 0.0)
    copy = pad.launcher.nodes(Launch([], [root], is_canonical=True), pad.served, 0.0)
    (row,) = copy.rows
    assert (row.token, row.position, row.slot != root.slot) == (7, 2, True)
    after = pad.launcher.nodes(Launch([], [root]), pad.served, 0.0)
    assert SlotOp(SlotOpKind.RELEASE, row.slot, 1, 0, 1) in after.ops
    assert after.rows[0].slot == row.slot
    assert pad.allocator.counts()[1] == 0
    assert [run.is_canonical for run in pad.flight][1:] == [False, True, False]


def test_rows_are_counted_for_the_session_that_they_belong_to() -> None:
    pad = Pad(2, 2).prompted()
    one, two = pad.next_root(1, 7), pad.next_root(2, 7)
    guess = pad.served[2].tree.add(two, 9, -0.1)
    assert guess is not None
    pad.launcher.nodes(Launch([one, two, guess], [one]), pad.served, 0.0)
    counted = [(one.stats.runs, one.stats.rows, one.stats.drafted, one.runs) for one in pad.served.values()]
    assert counted == [(1, 2, 0, 2), (1, 2, 1, 2)]
    assert [*pad.flight][-1].rows == 4
