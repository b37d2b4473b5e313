"""Requests queue in the orchestrator, one is served at a time, and each is known by its caller's number."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeinfer.core.addresses import FIRST_STAGE, ORCHESTRATOR
from pipeinfer.core.edges import Edges
from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.messages import Body, Credit, Hello, Result, Run, Shutdown
from pipeinfer.core.ports import (
    Aborted,
    Closed,
    Command,
    Finish,
    Halt,
    Idle,
    Received,
    Request,
    RequestStats,
    Send,
    Submitted,
)
from pipeinfer.orchestrator.machine import Orchestrator
from speculation.schedules.policy import Policy

SHORT = Request((1, 2), 3)


class Head:
    """An orchestrator of one stage that has said Hello, and answers each run with a tombstone when it is told to."""

    def __init__(self) -> None:
        self.machine = Orchestrator(1, 0, Policy("plain", speculate=False), context=16)
        self._stage = Edges(FIRST_STAGE)
        self._runs = 0
        self.stage_says(Hello(0))

    def stage_says(self, body: Body) -> list[Command]:
        return self.machine.handle(Received(self._stage.message(ORCHESTRATOR, body)), 0.0)

    def submit(self, number: int, request: Request = SHORT) -> list[Command]:
        return self.machine.handle(Submitted(request, number), 0.0)

    def abort(self, number: int) -> list[Command]:
        return self.machine.handle(Aborted(number), 0.0)

    def close(self) -> list[Command]:
        return self.machine.handle(Closed(), 0.0)

    def comes_back(self) -> list[Command]:
        """The oldest run in flight, which was aborted."""
        self._runs += 1
        self.stage_says(Credit(self._runs))
        return self.stage_says(Result(self._runs, is_tombstone=True))


def prompts(commands: list[Command]) -> list[list[int]]:
    """The tokens of the runs that leave."""
    sent = [command.message.body for command in commands if isinstance(command, Send)]
    return [[row.token for row in body.rows] for body in sent if isinstance(body, Run)]


def answers(commands: list[Command]) -> list[Command]:
    return [command for command in commands if not isinstance(command, Send)]


def test_the_next_request_begins_in_the_step_in_which_the_last_one_is_idle() -> None:
    head = Head()
    assert prompts(head.submit(7)) == [[1, 2]]
    assert head.submit(3, Request((5,), 1)) == []
    assert answers(head.abort(7)) == [Finish("aborted", 7)]
    done = head.comes_back()
    assert [type(command) for command in answers(done)] == [Idle]
    assert answers(done)[0].number == 7  # type: ignore[union-attr]
    assert prompts(done) == [[5]]


def test_a_waiting_request_is_withdrawn_without_a_word_to_anybody_else() -> None:
    head = Head()
    for number in (7, 3, 4):
        head.submit(number)
    assert head.abort(3) == [Finish("aborted", 3), Idle(RequestStats(), 3)]
    assert head.abort(3) == [], "it has ended"
    assert head.abort(99) == [], "nobody knows it"
    head.abort(7)
    assert head.abort(7) == [], "it has ended, and is not idle yet"
    head.comes_back()
    assert answers(head.abort(4)) == [Finish("aborted", 4)]


@pytest.mark.parametrize("is_busy", [False, True])
@pytest.mark.parametrize(
    "request_", [Request((), 3), Request((1,), 0), Request(tuple(range(15)), 2)], ids=["no prompt", "no token", "long"]
)
def test_what_cannot_be_served_is_refused_when_it_is_submitted(request_: Request, is_busy: bool) -> None:
    head = Head()
    if is_busy:
        head.submit(1)
    with pytest.raises(LocalProtocolError):
        head.submit(2, request_)
    assert head.abort(2) == [], "it does not wait"


def test_a_number_is_one_request_at_a_time() -> None:
    head = Head()
    head.submit(1)
    head.submit(2)
    for number in (1, 2):
        with pytest.raises(LocalProtocolError, match=f"request {number}"):
            head.submit(number, replace(SHORT, max_new_tokens=1))
    head.abort(1)
    head.comes_back()
    head.submit(1)


def test_closing_withdraws_what_waits_and_what_is_served_and_ends_when_all_is_idle() -> None:
    head = Head()
    for number in (1, 2, 3):
        head.submit(number)
    told = answers(head.close())
    assert [(type(one), one.number) for one in told if isinstance(one, Finish | Idle)] == [
        (Finish, 2), (Idle, 2), (Finish, 3), (Idle, 3), (Finish, 1),
    ]  # fmt: skip
    assert Halt() not in told
    with pytest.raises(LocalProtocolError, match="after the last one"):
        head.submit(4)
    last = head.comes_back()
    assert [type(one) for one in answers(last)] == [Idle, Halt]
    assert [type(one.message.body) for one in last if isinstance(one, Send)] == [Shutdown]


def test_closing_an_idle_job_ends_it_at_once() -> None:
    assert Halt() in Head().close()
