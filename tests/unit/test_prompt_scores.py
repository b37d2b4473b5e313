"""A request that wants log-probabilities of its prompt: which rows ask for them, and what its caller hears."""

from __future__ import annotations

import pytest

from pipeinfer.core.errors import LocalProtocolError, RemoteProtocolError
from pipeinfer.core.messages import NO_TOKEN, Result, ResultRow, Run, SlotOpKind, TopToken, Wants
from pipeinfer.core.ports import Command, Note, Sampling, Score
from speculation.schedules.prefill_chunks import PrefillChunks
from tests.unit.orchestrated import Head, bodies, finished, idle, operations, places, scored, text, token_at

WANTED = Sampling(prompt_logprobs=0)
LONG = tuple(range(20, 40))


def scores(commands: list[Command], number: int) -> list[float]:
    return [logp for one in commands if isinstance(one, Score) and one.number == number for logp in one.logps]


def all_scores(length: int) -> list[float]:
    return [scored(position) for position in range(1, length)]


def results(run: Run) -> list[ResultRow]:
    """The rows that come back of a run of one prompt, in order."""
    last = len(run.rows) - 1
    return [
        ResultRow(99 if index == last else token, row.slot, row.position, scored(row.position + 1), row.sequence)
        for index, (row, token) in enumerate(zip(run.rows, run.next_tokens, strict=True))
    ]


def test_each_row_carries_the_token_after_it_to_the_end_of_the_prompt() -> None:
    head = Head(prefill_chunk=3)
    commands = head.submit(1, range(10, 15), sampling=WANTED)
    commands += head.trip()
    first, second = bodies(commands, Run)
    assert (first.next_tokens, first.wants) == ((11, 12, 13), Wants.NOTHING), "13 leaves with the next chunk"
    assert (second.next_tokens, second.wants) == ((14, NO_TOKEN), Wants.LAST)
    assert scores(commands, 1) == [scored(1), scored(2), scored(3)]
    commands += head.until_idle()
    assert scores(commands, 1) == all_scores(5)
    assert (text(commands, 1), finished(commands)) == ([token_at(5), token_at(6), token_at(7)], [(1, "length")])
    assert all(not run.next_tokens for run in bodies(commands, Run)[2:]), "what is decoded is known anyway"


def test_other_prompts_of_its_run_ask_for_nothing() -> None:
    head = Head(places=3, is_ready=False)
    for number, sampling in ((1, Sampling()), (2, WANTED), (3, Sampling())):
        head.submit(number, range(10, 13), 1, sampling=sampling)
    (run,) = bodies(commands := head.ready(), Run)
    assert run.next_tokens == (*[NO_TOKEN] * 3, 11, 12, NO_TOKEN, *[NO_TOKEN] * 3)
    commands += head.until_idle()
    assert [scores(commands, number) for number in (1, 2, 3)] == [[], all_scores(3), []]
    assert not bodies(Head().submit(1, range(3)), Run)[0].next_tokens


def test_nothing_new_may_be_wanted() -> None:
    head = Head(keeps=True)
    commands = head.submit(1, LONG, 0, sampling=WANTED) + head.until_idle()
    assert (scores(commands, 1), text(commands, 1)) == (all_scores(20), [])
    assert (finished(commands), idle(commands)) == ([(1, "length")], [1])
    commands = head.submit(2, LONG, 1) + head.until_idle()
    assert [op.length for op in operations(bodies(commands, Run), SlotOpKind.FORK)] == [19], "it is kept for others"
    assert text(commands, 2) == [token_at(20)]


def test_a_prompt_of_one_token_has_nothing_to_tell() -> None:
    head = Head()
    commands = head.submit(1, [7], 0, sampling=WANTED) + head.until_idle()
    assert (scores(commands, 1), finished(commands)) == ([], [(1, "length")])
    assert not bodies(commands, Run)[0].next_tokens


def test_nothing_new_needs_log_probabilities() -> None:
    with pytest.raises(LocalProtocolError, match="at least one new token"):
        Head().submit(1, [7], 0)


def test_a_prompt_may_fill_the_whole_context() -> None:
    head = Head(places=1, slots=(64, 0))
    commands = head.submit(1, range(64), 0, sampling=WANTED) + head.until_idle()
    assert (scores(commands, 1), finished(commands)) == (all_scores(64), [(1, "length")])


def test_it_shares_no_beginning_with_others() -> None:
    head = Head(keeps=True)
    head.submit(1, LONG, 2)
    head.until_idle()
    commands = head.submit(2, LONG, 2, sampling=WANTED) + head.until_idle()
    runs = bodies(commands, Run)
    assert not operations(runs, SlotOpKind.FORK)
    assert (places(runs[0])[0], scores(commands, 2)) == ((2, 0), all_scores(20))


def test_a_preempted_request_asks_for_what_is_not_known_yet() -> None:
    head = Head(slots=(8, 0), is_ready=False)
    for number in (1, 2):
        head.submit(number, range(3), 5, sampling=WANTED)
    commands = head.ready() + head.until_idle()
    assert [one.what for one in commands if isinstance(one, Note)] == ["preempt request 2"]
    assert [scores(commands, number) for number in (1, 2)] == [all_scores(3)] * 2
    assert sorted(finished(commands)) == [(1, "length"), (2, "length")]


def test_the_most_probable_tokens_come_along() -> None:
    head = Head()
    (run,) = bodies(head.submit(1, [7, 8, 9], 1, sampling=Sampling(prompt_logprobs=2)), Run)
    rows = [row._replace(top_count=2 if row.position < 2 else 0) for row in results(run)]
    tops = tuple(TopToken(token, -1.0) for token in range(4))
    commands = head.says(Result(run.run, rows=tuple(rows), top=tops))
    (score,) = [one for one in commands if isinstance(one, Score)]
    assert (score.logps, score.tops) == ((scored(1), scored(2)), (tops[:2], tops[2:]))


def test_a_result_without_one_of_them_is_refused() -> None:
    head = Head()
    (run,) = bodies(head.submit(1, [7, 8, 9], 1, sampling=WANTED), Run)
    with pytest.raises(RemoteProtocolError, match="to be scored"):
        head.says(Result(run.run, rows=tuple(results(run)[1:])))


def test_nothing_is_learnt_from_it_of_what_other_prompts_take(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = list[int]()
    monkeypatch.setattr(PrefillChunks, "prefilled", lambda chunks, rows, slowest_s: learnt.append(rows))
    head = Head(stages=2, is_ready=False, prefill_chunk=4)
    head.submit(1, range(8), 1, sampling=WANTED)
    head.submit(2, range(3), 1)
    head.ready()
    head.until_idle()
    assert learnt == [3]


def test_nobody_hears_more_of_a_request_that_was_aborted() -> None:
    head = Head(prefill_chunk=3)
    head.submit(1, range(10, 18), 2, sampling=WANTED)
    head.credit()
    commands = head.abort(1) + head.until_idle()
    assert (scores(commands, 1), finished(commands), idle(commands)) == ([], [(1, "aborted")], [1])
