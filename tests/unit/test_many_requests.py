"""Several requests in one pipeline: who begins when, which rows share a run, and how each request ends."""

from __future__ import annotations

import pytest

from pipeinfer.core.addresses import FIRST_DRAFTER
from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.messages import (
    NO_SLOT,
    Cancel,
    Cancelled,
    Close,
    DraftNode,
    Nodes,
    Prompt,
    Settings,
    Shutdown,
    SlotOp,
    SlotOpKind,
    Wants,
    accepted_name,
    fault_token,
)
from pipeinfer.core.ports import Emit, Finish, Halt, Idle
from tests.unit.orchestrated import Head, answers, bodies, finished, idle, places, text, token_at

FREE_ONE = SlotOp(SlotOpKind.FREE, sequence=1)


def both_decode(**more: object) -> Head:
    """Requests 1 and 2, each of two prompt tokens, have their first token; run 2 has the rows after these."""
    head = Head(is_ready=False, **more)  # type: ignore[arg-type]
    head.submit(1, (1, 2), 9)
    head.submit(2, (6, 7), 9)
    head.ready()
    head.trip()
    return head


# Who begins when.


def test_requests_begin_in_the_order_of_priority_then_arrival() -> None:
    head = Head(places=1)
    head.submit(1, (1,))
    for number, priority in ((2, 1), (3, 0), (4, 1), (5, 0), (6, -3)):
        head.submit(number, (number,), priority=priority)
    ended = idle(head.until_idle())
    assert ended == [1, 6, 3, 5, 2, 4], "who is served already is not displaced"


def test_each_request_is_a_sequence_of_its_own_that_stage_and_drafter_hear_of() -> None:
    head = Head(drafters=1)
    commands = head.submit(7, (1, 2)) + head.submit(3, (6, 7))
    assert [settings.sequence for settings in bodies(commands, Settings)] == [1, 1, 2, 2]
    assert [(prompt.sequence, prompt.tokens) for prompt in bodies(commands, Prompt)] == [(1, (1, 2)), (2, (6, 7))]


def test_a_place_is_taken_until_the_last_run_of_its_session_is_back() -> None:
    head = both_decode()
    assert bodies(head.submit(3, (8, 9)), Settings) == []
    assert finished(head.abort(1)) == [(1, "aborted")]
    assert bodies(head.credit(), Settings) == [], "run 2 has a row of request 1"
    back = head.back()
    assert (idle(back), [one.sequence for one in bodies(back, Settings)]) == ([1], [3])


def test_a_place_without_runs_in_flight_is_free_at_once() -> None:
    head = Head()
    for number in (1, 2, 3):
        head.submit(number, (number,))
    assert places(head.runs[0]) == [(1, 0)], "the prompt of request 2 has not left"
    commands = head.abort(2)
    assert (finished(commands), idle(commands), bodies(commands, Cancel)) == ([(2, "aborted")], [2], [])
    assert [settings.sequence for settings in bodies(commands, Settings)] == [3]


def test_one_place_is_one_request_after_the_other() -> None:
    head = Head(places=1)
    head.submit(1, (1, 2), 1)
    head.submit(2, (6, 7), 1)
    head.credit()
    ended = head.back()
    assert answers(ended)[:2] == [Emit((token_at(2),), (-0.5,), 1), Finish("length", 1)]
    assert idle(ended) == [1]
    assert [places(run) for run in head.runs] == [[(2, 0), (2, 1)]]
    assert head.runs[0].ops == (FREE_ONE,)


@pytest.mark.parametrize("when", ["waits", "decodes", "ends"])
def test_a_number_is_taken_until_the_last_run_of_its_request_is_back(when: str) -> None:
    head = both_decode()
    head.submit(3, (8, 9))
    if when == "ends":
        head.abort(1)
    number = 3 if when == "waits" else 1
    with pytest.raises(LocalProtocolError, match=f"request {number} "):
        head.submit(number, (4,))
    if when == "ends":
        head.trip()
        head.submit(1, (4,))


def test_nothing_is_begun_before_there_are_slots_for_its_prompt_and_a_token() -> None:
    head = Head(places=3, slots=(12, 0))
    head.submit(1, range(4), 8)
    assert bodies(head.submit(2, range(6), 2), Settings), "12 slots are 4 + 1 and 6 + 1"
    assert not bodies(head.submit(3, (5,), 2), Settings)
    commands = head.until_idle()
    assert sorted(idle(commands)) == [1, 2, 3]
    assert [len(text(commands, number)) for number in (1, 2, 3)] == [8, 2, 2]


def test_who_waits_for_slots_is_not_overtaken() -> None:
    head = Head(places=3, slots=(12, 0))
    head.submit(1, range(6), 3)
    head.submit(2, range(6), 2)
    assert not bodies(head.submit(3, (5,), 1), Settings), "request 2 comes first, though 3 would find slots"
    assert idle(head.until_idle()) == [1, 3, 2]


# Which rows share a run.


def test_ends_of_several_prompts_share_a_run() -> None:
    head = Head(places=3, is_ready=False, prefill_chunk=5)
    for number, length in ((1, 7), (2, 2), (3, 2)):
        head.submit(number, range(length))
    head.ready()
    for _ in range(3):
        head.credit()
    first, second, third = head.runs
    assert (places(first), first.wants) == ([(1, position) for position in range(5)], Wants.NOTHING)
    assert (places(second), second.wants) == ([(1, 5), (1, 6), (2, 0), (2, 1)], Wants.LAST)
    assert (places(third), third.wants) == ([(3, 0), (3, 1)], Wants.LAST)
    assert all(run.is_canonical for run in head.runs)
    assert answers(head.back()) == [], "of a chunk nothing is wanted"
    commands = head.back()
    assert [text(commands, number) for number in (1, 2, 3)] == [[token_at(7)], [token_at(2)], []]


def test_an_end_that_does_not_fit_leaves_room_for_shorter_ones() -> None:
    head = Head(places=3, is_ready=False, prefill_chunk=4)
    for number, length in ((1, 2), (2, 3), (3, 2)):
        head.submit(number, range(length))
    head.ready()
    assert places(head.runs[0]) == [(1, 0), (1, 1), (3, 0), (3, 1)]


def test_rows_of_several_sequences_share_a_run_sorted_by_sequence_then_position() -> None:
    head = both_decode(drafters=1)
    assert places(head.runs[0]) == [(1, 2), (2, 2)]
    head.guess(2, 2, token_at(3), token_at(4), logp=-0.1)
    head.guess(1, 2, token_at(3), logp=-0.3)
    head.credit()
    assert places(head.runs[1]) == [(1, 3), (2, 3), (2, 4)]
    commands = head.back()
    assert [text(commands, number) for number in (1, 2)] == [[token_at(3)], [token_at(3)]]
    commands = head.back()
    assert [text(commands, number) for number in (1, 2)] == [[token_at(4)], [token_at(4), token_at(5)]]


def test_no_two_rows_in_flight_share_a_slot() -> None:
    head = both_decode(drafters=1)
    head.guess(1, 2, 31, 32)
    head.guess(2, 2, 31, 32)
    head.credit()
    slots = [row.slot for run in head.runs for row in run.rows]
    assert len(slots) == len(set(slots)) == 6


def test_known_tokens_are_spread_over_the_stages() -> None:
    head = Head(places=5, stages=2, is_ready=False)
    for number in range(1, 6):
        head.submit(number, (number,), 9)
    head.ready()
    head.trip()
    head.credit()
    assert [places(run) for run in head.runs] == [[(1, 1), (2, 1), (3, 1)], [(4, 1), (5, 1)]]


def test_runs_of_prompts_and_runs_of_nodes_take_turns() -> None:
    head = Head(drafters=1, prefill_chunk=2, max_rows=1, window=9)
    head.submit(1, (1, 2), 20)
    head.trip()
    head.submit(2, range(6), 2)
    head.guess(1, 2, *map(token_at, range(3, 9)))
    for _ in range(6):
        head.credit()
    assert [run.is_canonical for run in head.runs] == [False, True, False, True, False, True, False]
    assert [places(run)[0][0] for run in head.runs] == [1, 2, 1, 2, 1, 2, 1]


def test_a_prompt_does_not_wait_for_nodes_that_are_not_there() -> None:
    head = Head(prefill_chunk=2)
    head.submit(1, (1, 2), 20)
    head.trip()
    head.submit(2, range(6), 2)
    for _ in range(3):
        head.credit()
    assert [places(run)[0] for run in head.runs] == [(1, 2), (2, 0), (2, 2), (2, 4)]


# What is of no use is cancelled.


def test_single_rows_of_shared_runs_are_cancelled() -> None:
    head = both_decode(drafters=1)
    head.guess(1, 2, 31, logp=-0.1)
    head.guess(2, 2, token_at(3), token_at(4), logp=-0.1)
    head.credit()
    shared = head.runs[1]
    assert places(shared) == [(1, 3), (2, 3), (2, 4)]
    commands = head.back()
    assert bodies(commands, Cancel) == [Cancel(False, (Cancelled(shared.run, shared.rows[0].slot, 1),))]
    commands = head.back({(1, 4): 77})
    assert text(commands, 1) == [], "the row was computed all the same, and nobody looks"
    assert text(commands, 2) == [token_at(4), token_at(5)]


def test_a_shared_run_whose_rows_are_all_dead_is_cancelled_whole() -> None:
    head = both_decode(drafters=1)
    head.guess(1, 2, 31)
    head.guess(2, 2, 32)
    head.credit()
    assert places(head.runs[1]) == [(1, 3), (2, 3)]
    (cancel,) = bodies(head.back(), Cancel)
    assert cancel.rows == (Cancelled(3, NO_SLOT, 1),)
    head.credit()
    assert answers(head.skipped()) == []
    assert places(head.runs[0]) == [(1, 3), (2, 3)], "the known tokens, which nobody had guessed"


def test_the_guesses_of_an_aborted_request_are_cancelled_and_others_live() -> None:
    head = both_decode(drafters=1)
    head.guess(1, 2, token_at(3))
    head.guess(2, 2, token_at(3))
    head.credit()
    guesses = head.runs[1]
    commands = head.abort(1)
    assert bodies(commands, Cancel) == [Cancel(False, (Cancelled(guesses.run, guesses.rows[0].slot, 1),))], (
        "not the root: a later run may commit its slot"
    )
    assert bodies(commands, Close) == [Close(1)]
    commands = head.back() + head.back()
    assert (text(commands, 1), text(commands, 2)) == ([], [token_at(3), token_at(4)])
    assert idle(commands) == [1]


def test_a_prompt_that_is_aborted_leaves_the_other_prompts_of_its_run() -> None:
    head = Head(is_ready=False)
    head.submit(1, (1, 2))
    head.submit(2, (6, 7))
    head.ready()
    (run,) = head.runs
    commands = head.abort(1)
    assert bodies(commands, Cancel) == [Cancel(False, tuple(Cancelled(run.run, row.slot, 1) for row in run.rows[:2]))]
    assert bodies(head.abort(2), Cancel) == [Cancel(False, (Cancelled(run.run, NO_SLOT, 1),))]
    assert idle(head.skipped()) == [1, 2]


# How each request ends.


def test_a_request_ends_and_the_others_go_on() -> None:
    head = Head(is_ready=False)
    head.submit(1, (1, 2), 9, stop_tokens=frozenset({token_at(3)}))
    head.submit(2, (6, 7), 4)
    head.ready()
    commands = head.until_idle()
    assert (text(commands, 1), text(commands, 2)) == ([token_at(2), token_at(3)], [*map(token_at, range(2, 6))])
    assert finished(commands) == [(1, "stop"), (2, "length")]
    assert idle(commands) == [1, 2]


def test_what_is_not_finite_ends_one_request_only() -> None:
    head = both_decode()
    commands = head.back({(1, 3): fault_token(5)})
    assert answers(commands)[:1] == [Finish("error", 1, 5)]
    assert text(commands, 2) == [token_at(3)]
    assert finished(head.until_idle()) == [(2, "length")]


def test_a_prompt_that_is_not_finite_ends_one_request_only() -> None:
    head = Head(is_ready=False)
    head.submit(1, (1, 2))
    head.submit(2, (6, 7))
    head.ready()
    commands = head.back({(2, 2): fault_token(3)})
    assert finished(commands) == [(2, "error")]
    assert text(commands, 1) == [token_at(2)]


def test_slots_of_a_request_are_freed_by_the_first_run_after_its_last_result() -> None:
    head = both_decode(drafters=1)
    head.guess(2, 2, token_at(3), token_at(4))
    head.guess(1, 2, token_at(3))
    head.credit()
    head.abort(1)
    head.back()
    head.guess(2, 3, token_at(4), token_at(5), token_at(6))
    head.credit()
    assert FREE_ONE not in [op for run in head.runs for op in run.ops], "run 3 has rows of it"
    assert idle(head.back()) == [1]
    head.guess(2, 5, token_at(6), token_at(7), token_at(8), token_at(9))
    head.credit()
    assert head.runs[-1].ops.count(FREE_ONE) == 1
    assert head.allocator.length(1) == 0


def test_what_comes_late_of_a_request_does_not_touch_others() -> None:
    head = both_decode(drafters=1)
    head.abort(1)
    late = Nodes(1, 2, False, (DraftNode(30, 9, accepted_name(2), -0.5),))
    assert head.says(late, FIRST_DRAFTER) == []
    commands = head.back({(1, 3): 77})
    assert [one for one in answers(commands) if not isinstance(one, Idle)] == [Emit((token_at(3),), (-0.5,), 2)]


def test_a_request_is_aborted_while_it_waits() -> None:
    head = both_decode()
    head.submit(3, (8, 9))
    commands = head.abort(3)
    assert (finished(commands), idle(commands), bodies(commands, Close)) == ([(3, "aborted")], [3], [])
    assert head.abort(3) == []


def test_a_request_is_aborted_amid_its_prompt() -> None:
    head = Head(prefill_chunk=2)
    head.submit(1, range(6))
    head.credit()
    commands = head.abort(1)
    assert finished(commands) == [(1, "aborted")]
    (cancel,) = bodies(commands, Cancel)
    assert [(dead.run, dead.slot) for dead in cancel.rows] == [(1, NO_SLOT), (2, NO_SLOT)]
    assert idle(head.skipped()) == []
    assert idle(head.skipped()) == [1]
    head.credit()
    head.submit(2, (6, 7))
    assert head.runs[0].ops == (FREE_ONE,)


# The end of the job.


def test_the_job_ends_once_when_all_sessions_are_over() -> None:
    head = both_decode(drafters=1)
    head.submit(3, (8, 9))
    closed = head.close()
    assert finished(closed) == [(3, "aborted"), (1, "aborted"), (2, "aborted")]
    assert (idle(closed), bodies(closed, Shutdown)) == ([3], [])
    last = head.back()
    assert idle(last) == [1, 2]
    assert bodies(last, Shutdown) == [Shutdown(), Shutdown()]
    assert [one for one in last if isinstance(one, Halt)] == [Halt()] == last[-1:]


def test_the_job_ends_once_where_no_run_is_in_flight() -> None:
    head = Head(is_ready=False)
    for number in (1, 2, 3):
        head.submit(number, (number,))
    closed = head.close()
    assert sorted(idle(closed)) == [1, 2, 3]
    assert [one for one in closed if isinstance(one, Halt)] == [Halt()] == closed[-1:]


def test_a_job_that_is_closed_while_a_last_run_is_in_flight_ends_when_that_is_back() -> None:
    head = Head()
    head.submit(1, (1, 2))
    head.abort(1)
    assert head.close() == []
    last = head.skipped()
    assert (idle(last), bodies(last, Shutdown), last[-1]) == ([1], [Shutdown()], Halt())


def test_the_status_tells_of_all_requests() -> None:
    head = both_decode()
    head.submit(3, (8, 9))
    assert head.machine.status() == "runs 2 to 2 in flight, 0 credits, 2 requests, 1 waiting, 2 tokens emitted"
    assert head.machine.load[:2] == (1, 0)


def test_the_share_of_slots_in_use_counts_guesses_and_no_prefix_that_another_request_computed() -> None:
    prefix = range(20)
    head = Head(slots=(80, 20), keeps=True, drafters=1)
    assert head.machine.load[2] == 0.0
    head.submit(1, (*prefix, 30), 9)
    head.trip()
    assert head.machine.load[2] == 0.22, "the prompt and the root's slot"
    head.guess(1, 21, 51, 52)
    head.credit()
    assert head.machine.load[2] == 0.24
    head.submit(2, (*prefix, 31), 9)
    head.credit()
    assert head.machine.load[2] == 0.25
    head.abort(1)
    head.until_idle()
    assert head.allocator.free_slots() < 80, "a prefix is kept"
    assert head.machine.load[2] == 0.0
