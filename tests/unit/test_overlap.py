"""The next request begins while runs of the one before are in flight, or when the last of them is back."""

from __future__ import annotations

import pytest

from pipeinfer.core.addresses import FIRST_DRAFTER, FIRST_STAGE, ORCHESTRATOR
from pipeinfer.core.edges import Edges
from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.messages import (
    Body,
    Close,
    Credit,
    DraftNode,
    Hello,
    Nodes,
    Prompt,
    Result,
    ResultRow,
    Run,
    Settings,
    Shutdown,
    SlotOp,
    SlotOpKind,
    accepted_name,
)
from pipeinfer.core.ports import Closed, Command, Emit, Finish, Halt, Idle, Received, Request, Send, Submitted
from pipeinfer.orchestrator.machine import Orchestrator
from speculation.schedules.policy import Policy

ONE, TWO, THREE = Request((1, 2), 3), Request((6, 7), 3), Request((8, 9), 1)
FREE_ONE = SlotOp(SlotOpKind.FREE, sequence=1)


class Head:
    """An orchestrator of one stage and one drafter. It has served request 1 to its end while run 4 is in flight.

    Of runs 1 to 3, the prompt and two guesses, the results are back. Run 4 holds a guess that was wrong."""

    def __init__(self, overlap: bool, *others: Request) -> None:
        self.machine = Orchestrator(1, 1, Policy("test", topk=2, max_ahead=8), context=16, overlap=overlap)
        self._edges = {address: Edges(address) for address in (FIRST_STAGE, FIRST_DRAFTER)}
        for address in self._edges:
            self.says(Hello(0), address)
        for number, request in enumerate((ONE, *others), 1):
            self.machine.handle(Submitted(request, number), 0.0)
        guesses = ((10, 1, accepted_name(1)), (11, 2, 1), (12, 3, 1))
        self.says(Nodes(1, 1, False, tuple(DraftNode(*guess, -0.5) for guess in guesses)), FIRST_DRAFTER)
        for run in (1, 2, 3):
            self.says(Credit(run))
        self.says(Result(1, rows=(ResultRow(10, 1, 1, -0.5, 1),)))
        self.says(Result(2, rows=(ResultRow(11, 2, 2, -0.5, 1),)))
        self.ended = self.says(Result(3, rows=(ResultRow(13, 3, 3, -0.5, 1),)))

    def says(self, body: Body, source: int = FIRST_STAGE) -> list[Command]:
        return self.machine.handle(Received(self._edges[source].message(ORCHESTRATOR, body)), 0.0)


def bodies(commands: list[Command], *kinds: type) -> list[Body]:
    sent = [command.message.body for command in commands if isinstance(command, Send)]
    return [body for body in sent if type(body) in kinds]


def runs(commands: list[Command]) -> list[Run]:
    return [body for body in bodies(commands, Run) if isinstance(body, Run)]


def answers(commands: list[Command]) -> list[Command]:
    return [command for command in commands if not isinstance(command, Send)]


def idle(commands: list[Command]) -> list[int]:
    return [command.number for command in commands if isinstance(command, Idle)]


@pytest.mark.parametrize("overlap", [False, True])
def test_the_first_request_ends_with_a_run_in_flight(overlap: bool) -> None:
    head = Head(overlap, TWO)
    assert answers(head.ended)[:2] == [Emit((13,), (-0.5,), 1), Finish("length", 1)]
    assert idle(head.ended) == []
    assert bodies(head.ended, Close) == [Close(1)]
    assert head.machine.load[0] == 1


def test_without_overlap_the_next_request_begins_when_the_last_run_is_back() -> None:
    head = Head(False, TWO)
    assert bodies(head.ended, Settings, Prompt, Run) == []
    assert bodies(head.says(Credit(4)), Settings, Prompt, Run) == []
    back = head.says(Result(4, is_tombstone=True))
    assert idle(back) == [1]
    assert [type(body) for body in bodies(back, Settings, Prompt, Run)] == [Settings, Settings, Prompt, Run]
    (prompt,) = runs(back)
    assert ([row.token for row in prompt.rows], prompt.ops) == ([6, 7], (FREE_ONE,))


def test_with_overlap_the_next_prompt_leaves_while_the_last_runs_are_in_flight() -> None:
    head = Head(True, TWO)
    assert [type(body) for body in bodies(head.ended, Settings, Prompt)] == [Settings, Settings, Prompt]
    (prompt,) = runs([*head.ended, *head.says(Credit(4))])
    assert (prompt.run, prompt.is_canonical, [row.token for row in prompt.rows]) == (5, True, [6, 7])
    assert {row.sequence for row in prompt.rows} == {2}
    assert head.machine.load[0] == 2, "run 4 is in flight too"


def test_slots_of_the_last_request_are_freed_by_the_first_run_after_its_last_result() -> None:
    head = Head(True, TWO)
    prompt = runs([*head.ended, *head.says(Credit(4))])[0]
    assert SlotOpKind.FREE not in {op.kind for op in prompt.ops}, "run 4 may still be at work in its slots"
    allocator = head.machine._allocator
    assert allocator.length(1) == 4, "its prompt and the two guesses that were right"
    head.says(Nodes(2, 1, False, (DraftNode(20, 1, accepted_name(1), -0.5),)), FIRST_DRAFTER)
    (before,) = runs(head.says(Credit(5)))
    assert SlotOpKind.FREE not in {op.kind for op in before.ops}
    assert idle(head.says(Result(4, is_tombstone=True))) == [1]
    allocator.check()
    head.says(Nodes(2, 1, False, (DraftNode(21, 2, 1, -0.5),)), FIRST_DRAFTER)
    (after,) = runs(head.says(Credit(6)))
    assert (after.run, after.ops) == (7, (FREE_ONE,))
    assert allocator.length(1) == 0


def test_no_slot_belongs_to_two_requests() -> None:
    head = Head(True, TWO)
    mine = set(head.machine._allocator._canonical[1]) | set(head.machine._allocator._leased)
    prompt = runs([*head.ended, *head.says(Credit(4))])[0]
    assert not mine & {row.slot for row in prompt.rows}


def test_what_comes_late_of_the_last_request_does_not_touch_the_next_one() -> None:
    head = Head(True, TWO)
    head.says(Credit(4))
    late = Nodes(1, 3, False, (DraftNode(30, 9, accepted_name(1), -0.5),))
    assert head.says(late, FIRST_DRAFTER) == []
    computed_after_all = head.says(Result(4, rows=(ResultRow(12, 4, 3, -0.5, 1),)))
    assert [type(one) for one in answers(computed_after_all)] == [Idle]
    assert head.machine._session is not None
    slot = head.machine._session.tree.root.slot
    assert slot is not None
    found = head.says(Result(5, rows=(ResultRow(20, slot, 1, -0.5, 2),)))
    assert answers(found) == [Emit((20,), (-0.5,), 2)]


def test_a_number_is_taken_until_its_last_run_is_back() -> None:
    head = Head(True, TWO)
    with pytest.raises(LocalProtocolError, match="request 1 "):
        head.machine.handle(Submitted(THREE, 1), 0.0)
    head.says(Result(4, is_tombstone=True))
    head.machine.handle(Submitted(THREE, 1), 0.0)


def test_the_job_ends_when_both_requests_are_over() -> None:
    head = Head(True, TWO)
    head.says(Credit(4))
    closed = head.machine.handle(Closed(), 0.0)
    assert answers(closed) == [Finish("aborted", 2)]
    first = head.says(Result(4, is_tombstone=True))
    assert (idle(first), bodies(first, Shutdown)) == ([1], [])
    last = head.says(Result(5, is_tombstone=True))
    assert idle(last) == [2]
    assert bodies(last, Shutdown) == [Shutdown(), Shutdown()]
    assert last[-1] == Halt()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_job_that_is_closed_while_a_last_run_is_in_flight_ends_when_that_is_back(overlap: bool) -> None:
    head = Head(overlap)
    assert head.machine.handle(Closed(), 0.0) == []
    last = head.says(Result(4, is_tombstone=True))
    assert (idle(last), bodies(last, Shutdown), last[-1]) == ([1], [Shutdown(), Shutdown()], Halt())


def test_a_request_that_comes_while_a_last_run_is_in_flight_begins_at_once() -> None:
    head = Head(True)
    head.says(Credit(4))
    (prompt,) = runs(head.machine.handle(Submitted(TWO, 2), 0.0))
    assert [row.token for row in prompt.rows] == [6, 7]
