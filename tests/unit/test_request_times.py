"""Of many requests at once the trace tells whose a row was, and when each request waited, was read and was decoded."""

from __future__ import annotations

from itertools import pairwise

import pytest

from pipeinfer.core.addresses import FIRST_DRAFTER, FIRST_STAGE, ORCHESTRATOR
from pipeinfer.core.messages import NO_SLOT, Row, Run, Settings, SlotOpKind
from pipeinfer.core.ports import Emit, Finish, Note, Request, Submitted
from pipeinfer.runtime.request_times import Phase, RequestReader, RequestTimes
from pipeinfer.runtime.timeline import Outcome, Timeline, read_timeline
from pipeinfer.runtime.trace import Trace
from pipeinfer.runtime.worth import Worth
from pipeinfer.sim.world import World
from speculation.schedules.policy import CONTINUOUS, PLAIN, Policy
from tests.invariants.traced import trace_world
from tests.unit.crowd import STAGES, crowd
from tests.unit.orchestrated import Head

POLICIES = (PLAIN, CONTINUOUS)


@pytest.fixture(scope="module", params=POLICIES, ids=lambda policy: policy.name)
def policy(request: pytest.FixtureRequest) -> Policy:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def timeline(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Timeline:
    paths = trace_world(crowd(policy), tmp_path_factory.mktemp("crowd") / "world")
    return read_timeline([Trace(path) for path in paths])


def test_the_world_has_what_is_to_be_read(timeline: Timeline) -> None:
    runs = [word.message.body for word in timeline.words if isinstance(word.message.body, Run)]
    kinds = {op.kind for run in runs for op in run.ops}
    assert {SlotOpKind.COMMIT, SlotOpKind.FREE, SlotOpKind.FORK} <= kinds
    assert sum(request.preemptions for request in timeline.requests) > 2
    assert max(len(span.shares) for span in timeline.spans) == 6, "requests share runs"


def test_every_token_of_a_request_but_its_last_has_one_accepted_row_at_every_stage(timeline: Timeline) -> None:
    """A preempted request reads the last token before each preemption again, as a part of its prompt."""
    for address in range(FIRST_STAGE, FIRST_STAGE + STAGES):
        accepted = {request.number: 0 for request in timeline.requests}
        for span in timeline.spans:
            for share in span.shares if span.address == address else ():
                accepted[share.request] += share.accepted
        for request in timeline.requests:
            assert 1 <= len(request.text) - accepted[request.number] <= 1 + request.preemptions, request.number


def test_shares_are_the_rows_of_a_pass(timeline: Timeline) -> None:
    for span in timeline.spans:
        if span.address >= FIRST_DRAFTER:
            assert span.shares == ()
            continue
        assert sum(share.rows for share in span.shares) == span.rows
        assert sum(share.accepted for share in span.shares) == span.accepted
        assert len(span.shares) == len({share.request for share in span.shares}) == span.sequences
        if span.outcome is Outcome.ACCEPTED:
            assert all(share.rows == share.accepted for share in span.shares)


def test_a_share_is_of_the_request_whose_tokens_are_in_its_rows(timeline: Timeline) -> None:
    """Prompts say whose their rows are: each stage reads exactly what a request did not share with another one."""
    launched = [
        word.message.body
        for word in timeline.words
        if isinstance(word.message.body, Run) and word.message.source == ORCHESTRATOR
    ]
    rows = {run.run: run.rows for run in launched if run.is_canonical}
    texts = {request.number: [*request.request.prompt, *request.text] for request in timeline.requests}
    prefills = [span for span in timeline.spans if span.outcome is Outcome.PREFILL and span.address == FIRST_STAGE]
    assert prefills
    for span in prefills:
        left = list(rows[span.number])
        for share in span.shares:
            mine, left = left[: share.rows], left[share.rows :]
            assert [row.token for row in mine] == [texts[share.request][row.position] for row in mine]


def test_phases_follow_each_other_and_the_user(policy: Policy, timeline: Timeline) -> None:
    answers = World(crowd(policy)).run()
    assert len(timeline.requests) == len(answers)
    for answer, request in zip(answers, timeline.requests, strict=True):
        assert (request.number, request.text, request.reason) == (answer.number, answer.tokens, answer.reason)
        assert request.emitted == answer.emitted_at
        phases = [span.phase for span in request.phases]
        again = [Phase.PREEMPTED, Phase.PREFILL, Phase.DECODING]
        assert [one for one in phases if one is Phase.WAITING] == phases[:1] == [Phase.WAITING]
        assert phases[1:3] == [Phase.PREFILL, Phase.DECODING]
        assert phases[3:] == again * request.preemptions
        for earlier, later in pairwise(request.phases):
            assert earlier.ended_s == later.began_s
        assert request.phases[0].began_s == request.submitted_s == answer.submitted_at
        assert request.phases[-1].ended_s == answer.emitted_at[-1][0]


def test_a_request_of_higher_priority_begins_first(timeline: Timeline) -> None:
    began = {request.number: request.phases[0].ended_s for request in timeline.requests}
    assert began[4] == min(began.values())


def reader_of(*submitted: tuple[int, int]) -> RequestReader:
    """Requests with these numbers and priorities wait."""
    reader = RequestReader()
    for number, priority in submitted:
        reader.hear(Submitted(Request((1, 2), 5, priority=priority), number), 0.0)
    return reader


def begin(reader: RequestReader, sequence: int, at_s: float) -> int:
    head = Head(is_ready=False)
    send = head.machine._send(FIRST_STAGE, Settings(sequence))
    begun = reader.carry_out(send, at_s)
    assert begun is not None
    return begun.number


def test_requests_begin_by_priority_then_arrival_and_a_preempted_one_keeps_its_place() -> None:
    reader = reader_of((7, 1), (3, 0), (5, 0))
    assert [begin(reader, 1, 1.0), begin(reader, 2, 2.0)] == [3, 5]
    reader.carry_out(Note("preempt request 5"), 3.0)
    reader.hear(Submitted(Request((1,), 5), 9), 3.5)
    assert [begin(reader, 3, 4.0), begin(reader, 4, 5.0), begin(reader, 5, 6.0)] == [5, 9, 7]
    assert [reader.number_of(sequence) for sequence in range(1, 7)] == [3, 5, 5, 9, 7, None]


def test_a_request_that_is_aborted_while_it_waits_never_begins() -> None:
    reader = reader_of((1, 0), (2, 0), (3, 0))
    assert begin(reader, 1, 1.0) == 1
    reader.carry_out(Finish("aborted", 2), 2.0)
    reader.carry_out(Note("preempt request 1"), 2.0)
    reader.carry_out(Finish("aborted", 1), 3.0)
    assert begin(reader, 2, 4.0) == 3
    reader.end(9.0)
    phases = {one.number: [(span.phase, span.began_s, span.ended_s) for span in one.phases] for one in reader.requests}
    assert phases == {
        1: [(Phase.WAITING, 0, 1), (Phase.PREFILL, 1, 2), (Phase.PREEMPTED, 2, 3)],
        2: [(Phase.WAITING, 0, 2)],
        3: [(Phase.WAITING, 0, 4), (Phase.PREFILL, 4, 9)],
    }
    assert [one.reason for one in reader.requests] == ["aborted", "aborted", ""]


def test_a_number_may_come_again() -> None:
    reader = reader_of((1, 0))
    begin(reader, 1, 1.0)
    reader.carry_out(Emit((5,), (), 1), 2.0)
    reader.carry_out(Finish("length", 1), 2.0)
    reader.hear(Submitted(Request((3,), 5), 1), 3.0)
    begin(reader, 2, 3.0)
    reader.carry_out(Emit((6, 7), (), 1), 4.0)
    assert [one.text for one in reader.requests] == [[5], [6, 7]]


def test_speed_is_that_of_the_tokens_after_the_first_emission() -> None:
    one = RequestTimes(0, 0, Request((1,), 9), 1.0)
    assert (one.ttft_s, one.tokens_per_s) == (None, None)
    one.emitted, one.text = [(3.0, 2)], [1, 2]
    assert (one.ttft_s, one.tokens_per_s) == (2.0, None)
    one.emitted, one.text = [(3.0, 2), (5.0, 4)], [1, 2, 3, 4, 5, 6]
    assert one.tokens_per_s == 2.0


def test_what_is_in_flight_when_one_sequence_ends_is_compared_with_its_own_text() -> None:
    """Rows of two sequences, equal in token and position: only one of them is right."""
    worth = Worth()
    worth.begin(1, [10, 11])
    worth.begin(2, [20, 21])
    rows = (Row(5, 30, NO_SLOT, 2, 1), Row(6, 31, 30, 3, 1), Row(5, 32, NO_SLOT, 2, 2), Row(6, 33, 32, 3, 2))
    worth.launch(Run(9, rows=rows))
    worth.emit(1, (5, 6))
    worth.emit(2, (5, 7))
    worth.settle(1)
    assert worth.accepted == {(9, 30), (9, 31)}
    worth.settle_all()
    assert worth.accepted == {(9, 30), (9, 31), (9, 32)}
    assert worth.owners == {(9, 30): 1, (9, 31): 1, (9, 32): 2, (9, 33): 2}
