"""Where a known token finds no slot the request that came last gives up its slots, and begins again later."""

from __future__ import annotations

import pytest

from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.messages import Cancel, Close, Prompt, Run, Settings, Shutdown, SlotOp, SlotOpKind
from pipeinfer.core.ports import Command, Finish, Halt, Note
from tests.unit.orchestrated import Head, answers, bodies, finished, idle, places, text, token_at

FREE_TWO = SlotOp(SlotOpKind.FREE, sequence=2)


def full(most: int = 5, priorities: tuple[int, int] = (0, 0), **more: object) -> tuple[Head, list[Command]]:
    """Requests 1 and 2, each of three prompt tokens, have decoded until all of eight slots are taken, and the last run
    is in flight. What was said so far comes with them."""
    head = Head(slots=(8, 0), is_ready=False, **more)  # type: ignore[arg-type]
    for number, priority in ((1, priorities[0]), (2, priorities[1])):
        head.submit(number, range(3), most, priority=priority)
    commands = head.ready() + head.trip()
    assert places(head.runs[0]) == [(1, 3), (2, 3)]
    assert head.allocator.free_slots() == 0
    head.credit()
    return head, commands


def preempted(commands: list[Command]) -> list[str]:
    return [one.what for one in commands if isinstance(one, Note)]


def test_the_request_that_came_last_gives_up_its_slots() -> None:
    head, _ = full()
    commands = head.back()
    assert preempted(commands) == ["preempt request 2"]
    assert (finished(commands), idle(commands)) == ([], []), "for its user nothing has happened"
    assert [text(commands, number) for number in (1, 2)] == [[token_at(4)], [token_at(4)]]
    (run,) = head.runs
    assert (places(run), run.ops[-1]) == ([(1, 4)], FREE_TWO)


def test_priority_goes_before_arrival() -> None:
    head, _ = full(priorities=(1, 0))
    assert preempted(head.back()) == ["preempt request 1"]


def test_it_begins_again_with_all_tokens_that_are_out_as_its_prompt() -> None:
    head, said = full()
    commands = head.back()
    while not idle(commands):
        assert bodies(commands, Settings) == []
        commands += head.trip()
    assert idle(commands) == [1]
    assert [settings.sequence for settings in bodies(commands, Settings)] == [3], "as a new sequence"
    assert [(row.token, row.position, row.sequence) for row in head.runs[-1].rows] == [
        (0, 0, 3), (1, 1, 3), (2, 2, 3), (token_at(3), 3, 3), (token_at(4), 4, 3)
    ]  # fmt: skip
    commands += head.until_idle()
    assert text(said + commands, 2) == text(said + commands, 1) == [*map(token_at, range(3, 8))]
    assert finished(commands) == [(1, "length"), (2, "length")]
    assert idle(commands) == [1, 2]


def test_it_stands_before_those_that_came_later() -> None:
    head, _ = full()
    head.submit(3, (9,), 5)
    assert preempted(head.back()) == ["preempt request 2"]
    assert idle(head.until_idle()) == [1, 2, 3]


def test_its_drafter_hears_of_the_end_and_of_the_new_beginning() -> None:
    head, _ = full(drafters=1)
    commands = head.back()
    assert bodies(commands, Close) == [Close(2)]
    commands = head.until_idle()
    (prompt,) = bodies(commands, Prompt)
    assert (prompt.sequence, prompt.tokens) == (3, (0, 1, 2, token_at(3), token_at(4)))
    assert prompt.last_position == 6, "the request is no longer than before"


def test_one_that_is_alone_is_never_preempted() -> None:
    head = Head(places=1, slots=(8, 0))
    head.submit(1, range(3), 5)
    assert preempted(head.until_idle()) == []


def test_a_guess_that_holds_a_slot_gives_it_back_first() -> None:
    head = Head(places=3, slots=(12, 3), drafters=1, is_ready=False, prefill_chunk=4)
    for number in (1, 2):
        head.submit(number, range(2), 9)
    head.ready()
    head.trip()
    head.submit(3, range(6), 9)
    head.credit()
    head.guess(2, 2, token_at(3), 31, 32)
    head.credit()
    assert [places(run) for run in head.runs[1:]] == [[(3, 0), (3, 1), (3, 2), (3, 3)], [(2, 3), (2, 4), (2, 5)]]
    head.credit()
    assert places(head.runs[-1]) == [(3, 4), (3, 5)]
    head.credit()
    commands = head.back() + head.back()
    assert [text(commands, number) for number in (1, 2)] == [[token_at(3)], [token_at(3)]]
    assert head.allocator.counts() == (0, 2, 13), "there is no slot for the known token of request 1"
    assert preempted(commands) == [] and bodies(commands, Run) == [], "it waits"
    assert preempted(head.back()) == []
    assert places(head.runs[-1]) == [(1, 3), (2, 4)]


def test_a_guess_takes_no_slot_from_the_known_token_of_its_run() -> None:
    head = Head(slots=(7, 3), drafters=1, prefill_chunk=4)
    head.submit(1, range(2), 9)
    head.trip()
    head.submit(2, range(5), 1)
    head.credit()
    commands = head.back()
    assert text(commands, 1) == [token_at(3)]
    assert [places(run) for run in head.runs] == [[(2, 0), (2, 1), (2, 2), (2, 3)]]
    head.guess(1, 3, 31, 32, 33)
    assert head.allocator.free_slots() == 3
    head.credit()
    assert places(head.runs[-1]) == [(1, 3), (1, 4), (1, 5)]


def test_a_prompt_takes_no_slot_from_the_known_token_of_another_request() -> None:
    head = Head(slots=(9, 0), prefill_chunk=2)
    head.submit(1, range(1), 5)
    head.trip()
    head.submit(2, range(5), 1)
    said, most = list[Command](), 0
    while head.runs:
        said += head.back() + head.credit()
        most = max(most, 9 - head.allocator.free_slots())
    assert preempted(said) == [], "a prompt's row has waited, and then request 1 was over"
    assert idle(said) == [1, 2]
    assert most == 9, "all slots were taken once"


def in_flight() -> tuple[Head, list[Command]]:
    """Two stages; request 1 finds no slot while a run of request 2 is in flight."""
    head = Head(slots=(8, 0), stages=2, is_ready=False)
    for number in (1, 2):
        head.submit(number, range(3), 5)
    said = head.ready() + head.trip()
    head.credit()
    assert [places(run) for run in head.runs] == [[(1, 3)], [(2, 3)]]
    said += head.back()
    return head, said


def test_what_comes_back_of_a_preempted_request_is_ignored() -> None:
    head, said = in_flight()
    assert preempted(said) == ["preempt request 2"]
    assert bodies(said, Cancel) == [], "its root, which a later run may have committed"
    commands = head.trip()
    assert text(commands, 2) == [] and idle(commands) == []
    commands += head.until_idle()
    assert text(said + commands, 2) == [*map(token_at, range(3, 8))]
    assert idle(commands) == [1, 2]


def test_a_preempted_prompt_is_cancelled_and_begins_anew() -> None:
    head = Head(slots=(12, 0), prefill_chunk=1)
    head.submit(1, range(1), 9)
    head.trip()
    head.submit(2, range(7), 2)
    head.credit()
    said = list[Command]()
    while not preempted(said):
        chunks = [run.run for run in head.runs if run.is_canonical]
        said = head.trip()
    assert preempted(said) == ["preempt request 2"]
    (cancel,) = bodies(said, Cancel)
    assert cancel.rows and {dead.run for dead in cancel.rows} <= {*chunks}
    said = head.until_idle()
    assert text(said, 2) == [token_at(7), token_at(8)]
    assert idle(said) == [1, 2]


# It is aborted.


def test_a_preempted_request_is_aborted_while_it_waits() -> None:
    head, _ = full()
    head.back()
    commands = head.abort(2)
    assert (finished(commands), idle(commands)) == ([(2, "aborted")], [2])
    assert head.abort(2) == []
    assert idle(head.until_idle()) == [1]


def test_a_preempted_request_is_aborted_while_its_last_run_is_in_flight() -> None:
    head, _ = in_flight()
    commands = head.abort(2)
    assert answers(commands) == [Finish("aborted", 2)]
    assert head.abort(2) == []
    head.credit()
    assert idle(head.back()) == [2]
    commands = head.until_idle()
    assert (idle(commands), text(commands, 2)) == ([1], [])


@pytest.mark.parametrize("flies", [False, True])
def test_the_number_of_a_preempted_request_is_taken(flies: bool) -> None:
    head, _ = in_flight() if flies else full()
    if not flies:
        head.back()
    with pytest.raises(LocalProtocolError, match="request 2 "):
        head.submit(2, (9,))


@pytest.mark.parametrize("flies", [False, True])
def test_the_job_ends_with_a_preempted_request(flies: bool) -> None:
    head, _ = in_flight() if flies else full()
    if not flies:
        head.back()
    commands = head.close()
    assert sorted(finished(commands)) == [(1, "aborted"), (2, "aborted")]
    while head.runs:
        commands += head.trip()
    assert sorted(idle(commands)) == [1, 2]
    assert [one for one in commands if isinstance(one, Halt)] == [Halt()]
    assert len(bodies(commands, Shutdown)) == (2 if flies else 1)
