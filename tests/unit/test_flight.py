"""Runs in flight: what comes back, and what is found to be of no use."""

from __future__ import annotations

import pytest

from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import Cancelled, Result, ResultRow, fault_token
from pipeinfer.core.ports import Request
from pipeinfer.orchestrator.flight import Flight, InFlight
from pipeinfer.orchestrator.session import Session
from speculation.trees.tree import Node


def begun(sequence: int) -> Session:
    """A session whose root, at position 1, has been heard of."""
    session = Session(Request((1, 2), 9), 10 * sequence, sequence, [1, 2])
    session.begin(sequence, 50)
    session.tree.root.slot = 10 * sequence
    return session


def chain(session: Session, *tokens: int) -> list[Node]:
    """Guesses, each in a slot of its own."""
    nodes = [session.tree.root]
    for token in tokens:
        node = session.tree.add(nodes[-1], token, -0.1)
        assert node is not None
        session.tree.take(node)
        node.slot = 10 * session.sequence + len(nodes)
        nodes.append(node)
    return nodes[1:]


def result(run: InFlight, *rows: tuple[int, int], work_us: int = 0) -> Result:
    """Of ``run``; rows as (token, slot)."""
    return Result(run.number, rows=tuple(ResultRow(token, slot, 0, -0.5) for token, slot in rows), work_us=work_us)


def numbers(runs: list[InFlight]) -> list[int]:
    return [run.number for run in runs]


def test_runs_come_back_in_the_order_in_which_they_left() -> None:
    flight, one, two = Flight(), begun(1), begun(2)
    first, second = flight.launch([one], [], [], 1.0), flight.launch([one, two], [], [], 2.0)
    assert (len(flight), [*flight], str(flight)) == (2, [first, second], "runs 1 to 2 in flight")
    assert (one.runs, two.runs) == (2, 1)
    for number in (2, 3):
        with pytest.raises(RemoteProtocolError, match=f"result of run {number}, expected 1"):
            flight.land(number)
    assert flight.land(1) is first
    assert (one.runs, two.runs) == (1, 1)
    assert flight.land(2) is second
    assert str(flight) == "nothing in flight"
    with pytest.raises(RemoteProtocolError, match="expected none"):
        flight.land(3)


def test_each_node_hears_its_own_token() -> None:
    flight, one, two = Flight(), begun(1), begun(2)
    nodes = [*chain(one, 5, 6), *chain(two, 5)]
    run = flight.launch([one, two], nodes, [], 0.0)
    assert run.hear(result(run, (7, 11), (8, 12), (9, 21)), {1, 2}) == {}
    assert [(node.choice, node.choice_logp) for node in nodes] == [(7, -0.5), (8, -0.5), (9, -0.5)]


def test_only_rows_of_the_dead_may_be_missing() -> None:
    flight, one, two = Flight(), begun(1), begun(2)
    nodes = [*chain(one, 5, 6), *chain(two, 5)]
    run = flight.launch([one, two], nodes, [], 0.0)
    run.hear(Result(run.number, is_tombstone=True), {1, 2})
    nodes[1].alive = False
    run.hear(result(run, (7, 11)), {1})
    with pytest.raises(RemoteProtocolError, match="run 1 came back without its row at position 2"):
        run.hear(result(run, (7, 11)), {1, 2})


def test_the_first_layer_to_blame_is_told_of_each_prompt() -> None:
    run = Flight().launch([begun(1), begun(2)], [], [], 0.0)
    rows = [(fault_token(4), 1, 1), (fault_token(6), 2, 1), (9, 3, 2)]
    answer = Result(run.number, rows=tuple(ResultRow(token, slot, 0, 0.0, sequence) for token, slot, sequence in rows))
    assert run.hear(answer, {1, 2}) == {}, "no prompt: each node knows"
    run.is_prefill = True
    assert run.hear(answer, {1, 2}) == {1: 4}


def test_a_run_is_lost_with_the_last_of_its_nodes() -> None:
    flight, one, two = Flight(), begun(1), begun(2)
    roots = {1: one.tree.root, 2: two.tree.root}
    mine, other = chain(one, 5, 6), chain(two, 5)
    run = flight.launch([one, two], [*mine, *other], [], 0.0)
    assert flight.losses(one.tree.prune(), roots) == ([], [Cancelled(1, 11, 1), Cancelled(1, 12, 1)])
    assert flight.losses(two.tree.prune(), roots) == ([run], [])


def test_a_canonical_run_is_never_lost() -> None:
    flight, one = Flight(), begun(1)
    flight.launch([one], chain(one, 5), [], 0.0).is_canonical = True
    assert flight.losses(one.tree.prune(), {1: one.tree.root}) == ([], [Cancelled(1, 11, 1)])


def test_what_was_cancelled_or_has_not_left_is_not_lost_again() -> None:
    flight, one = Flight(), begun(1)
    nodes = chain(one, 5, 6)
    nodes[1].slot = None
    flight.launch([one], nodes[:1], [], 0.0).cancelled_at = 1.0
    assert flight.losses(one.tree.prune(), {1: one.tree.root}) == ([], [])


def test_a_run_of_copies_lives_as_long_as_these() -> None:
    flight, one = Flight(), begun(1)
    first, second = chain(one, 5, 6)
    flight.launch([one], [first, second], [], 0.0)
    copies = flight.launch([one], [], [second], 0.0)
    assert flight.losses([], {1: one.tree.root}) == ([], [])
    one.tree.advance(5)
    assert flight.losses([], {1: one.tree.root}) == ([], [])
    _, died = one.tree.advance(9)
    assert numbers(flight.losses(died, {1: one.tree.root})[0]) == [copies.number]


def test_of_a_session_that_is_over_all_but_the_root_is_of_no_use() -> None:
    flight, one, two = Flight(), begun(1), begun(2)
    mine, other = chain(one, 5, 6, 7), chain(two, 5)
    prompt = flight.launch([one], [], [], 0.0)
    prompt.is_prefill = True
    kept = flight.launch([one], mine[:1], [], 0.0)
    dead = flight.launch([one], mine[1:2], [], 0.0)
    shared = flight.launch([one, two], [mine[2], *other], [], 0.0)
    one.tree.advance(5)
    assert one.tree.root.run == kept.number
    assert flight.doomed(one) == ([prompt, dead], [Cancelled(shared.number, 13, 1)])
    assert flight.doomed(two)[0] == [shared], "nobody else has rows in it"


def test_no_chunk_of_a_prompt_is_skipped_before_one_that_may_be_computed() -> None:
    """Rows of the last chunk, which left with another prompt, follow those of the chunks before."""
    flight, one, two = Flight(), begun(1), begun(2)
    chunk = flight.launch([one], [], [], 0.0)
    ends = flight.launch([one, two], [one.tree.root, two.tree.root], [], 0.0)
    chunk.prompts, ends.prompts = {1: [8, 9]}, {1: [10], 2: [19, 20]}
    chunk.is_prefill = ends.is_prefill = True
    assert flight.doomed(one) == ([], [Cancelled(ends.number, 10, 1)])
    assert flight.doomed(two) == ([ends], []), "nobody else has rows in it"


def test_the_root_in_a_shared_run_is_written() -> None:
    flight, one, two = Flight(), begun(1), begun(2)
    nodes = [*chain(one, 5, 6), *chain(two, 5)]
    run = flight.launch([one, two], nodes, [], 0.0)
    one.tree.advance(5)
    assert flight.doomed(one) == ([], [Cancelled(run.number, 12, 1)])
    assert flight.doomed(two) == ([], [Cancelled(run.number, 21, 2)]), "the root of sequence 1 is in it"


def test_stats_of_a_shared_run_are_split() -> None:
    flight, one, two = Flight(), begun(1), begun(2)
    run = flight.launch([one, two], [], [], 1.0)
    run.account(result(run, work_us=8_000_000), 3.0, stages=2)
    assert (one.stats.busy_s, two.stats.busy_s) == (2.0, 2.0)
    two.is_over, run.cancelled_at = True, 2.5
    run.account(Result(run.number, is_tombstone=True, work_us=4_000_000), 3.0, stages=2)
    assert (one.stats.tombstones, one.stats.cancel_s, one.stats.busy_s) == (1, 0.5, 3.0)
    assert (two.stats.tombstones, two.stats.cancel_s, two.stats.busy_s) == (1, 0.5, 2.0), "it is over"
