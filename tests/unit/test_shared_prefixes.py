"""A request that begins like another one shares its slots: those of a sequence that is kept, or is decoded."""

from __future__ import annotations

import pytest

from pipeinfer.core.messages import Run, SlotOp, SlotOpKind, fault_token
from pipeinfer.core.ports import Note
from pipeinfer.orchestrator.pool import LEAST_SHARED
from tests.unit.orchestrated import Head, bodies, finished, idle, operations, places, text, token_at

LONG = tuple(range(20))
OTHER = tuple(range(200, 220))


def served(head: Head, number: int, prompt: tuple[int, ...], most: int = 2) -> list[Run]:
    """The runs of a request that is served from its beginning to its end."""
    commands = head.submit(number, prompt, most)
    commands += head.until_idle()
    assert idle(commands) == [number]
    assert len(text(commands, number)) == most
    return bodies(commands, Run)


def forks(runs: list[Run]) -> list[tuple[int, int]]:
    """The source and the length of each fork."""
    return [(op.slot, op.length) for op in operations(runs, SlotOpKind.FORK)]


def freed(runs: list[Run]) -> list[int]:
    return [op.sequence for op in operations(runs, SlotOpKind.FREE)]


def kept(**more: object) -> Head:
    """Request 1, sequence 1, has been served and is kept: the prompt LONG and two tokens after it."""
    head = Head(keeps=True, **more)  # type: ignore[arg-type]
    served(head, 1, LONG)
    return head


def test_a_request_goes_on_from_what_is_kept() -> None:
    head = kept()
    prompt = (*LONG, token_at(20), 7, 8)
    runs = served(head, 2, prompt)
    assert runs[0].ops[-1] == SlotOp(SlotOpKind.FORK, 1, 21, 0, 2)
    assert places(runs[0]) == [(2, 21), (2, 22)]
    assert [row.token for row in runs[0].rows] == [7, 8]


def test_the_whole_prompt_is_never_shared() -> None:
    """The target's choice after its last token is wanted."""
    head = kept()
    runs = served(head, 2, LONG)
    assert (forks(runs), places(runs[0])) == ([(1, 19)], [(2, 19)])


def test_a_request_goes_on_from_one_that_is_decoded() -> None:
    head = Head(keeps=True)
    head.submit(1, LONG, 9)
    head.trip()
    commands = head.submit(2, (*LONG, 7), 9) + head.credit()
    assert forks(bodies(commands, Run)) == [(1, 20)]
    assert places(head.runs[-1]) == [(2, 20)]
    commands += head.until_idle()
    assert [len(text(commands, number)) for number in (1, 2)] == [8, 9]


def test_a_prompt_that_has_not_been_read_is_not_shared() -> None:
    head = Head(keeps=True)
    head.submit(1, LONG)
    commands = head.submit(2, LONG) + head.until_idle()
    assert forks(bodies(commands, Run)) == []


@pytest.mark.parametrize("common", [0, LEAST_SHARED - 1, LEAST_SHARED, LEAST_SHARED + 2])
def test_tokens_are_compared(common: int) -> None:
    head = kept()
    runs = served(head, 2, (*LONG[:common], *OTHER[common:]))
    assert forks(runs) == ([(1, common)] if common >= LEAST_SHARED else [])
    assert places(runs[0])[0] == (2, common if common >= LEAST_SHARED else 0)


def test_the_longest_prefix_is_shared() -> None:
    head = kept()
    served(head, 2, (*LONG[:18], 7, 8, 9, 10))
    assert forks(served(head, 3, (*LONG[:18], 7, 8, 3))) == [(2, 20)]
    assert forks(served(head, 4, (*LONG, 7))) == [(1, 20)]


def test_a_shorter_sequence_is_not_kept() -> None:
    head = Head(keeps=True)
    served(head, 1, LONG[: LEAST_SHARED - 3])
    runs = served(head, 2, (*LONG[: LEAST_SHARED - 3], *OTHER))
    assert (forks(runs), freed(runs)) == ([], [1])


def test_nothing_is_kept_where_it_is_not_wanted() -> None:
    head = Head(keeps=False)
    served(head, 1, LONG)
    runs = served(head, 2, LONG)
    assert (forks(runs), freed(runs)) == ([], [1])


def test_what_is_shared_outlives_its_source() -> None:
    head = kept(slots=(44, 0))
    head.submit(2, (*LONG, 7), 15)
    head.trip()
    assert head.allocator.free_slots() == 44 - 23
    commands = head.submit(3, OTHER, 1) + head.until_idle()
    assert freed(bodies(commands, Run))[0] == 1, "to make room"
    assert idle(commands) == [3, 2]
    assert text(commands, 2)[-1] == token_at(35)


FAULT = {(1, 21): fault_token(3)}
"""Numbers of the row at position 20 are not finite."""


def test_an_erroneous_request_is_not_kept() -> None:
    """Who begins with that token has to fail as well, as it would if it were alone."""
    head = Head(places=1, keeps=True)
    head.submit(1, LONG, 9)
    head.trip()
    assert finished(head.credit() + head.back(FAULT)) == [(1, "error")]
    assert forks(served(head, 2, (*LONG, token_at(20), 7))) == []


def test_of_an_aborted_request_the_last_token_is_not_kept() -> None:
    """Nobody looks at what comes back of it, so it may be such a token, too."""
    head = Head(places=1, keeps=True)
    head.submit(1, LONG, 9)
    head.trip()
    head.abort(1)
    head.credit()
    assert idle(head.back(FAULT)) == [1]
    assert forks(served(head, 2, (*LONG, token_at(20), 7))) == [(1, 20)]


def test_a_token_whose_run_is_in_flight_is_not_shared() -> None:
    """Nobody knows yet whether its numbers are finite."""
    head = Head(keeps=True)
    head.submit(1, LONG, 9)
    head.trip()
    assert places(head.runs[0]) == [(1, 20)]
    commands = head.submit(2, (*LONG, token_at(20), 7), 9) + head.credit()
    assert forks(bodies(commands, Run)) == [(1, 20)]
    assert places(head.runs[1]) == [(2, 20), (2, 21)]
    assert finished(head.back(FAULT)) == [(1, "error")]


# Who is kept.


def test_an_aborted_prompt_is_not_kept_but_its_text_is_once_it_has_been_read() -> None:
    head = Head(places=1, keeps=True, prefill_chunk=10)
    head.submit(1, LONG)
    head.abort(1)
    head.credit()
    head.skipped()
    assert forks(served(head, 2, LONG)) == []
    head.submit(3, OTHER, 9)
    head.trip()
    head.trip()
    head.abort(3)
    head.credit()
    assert idle(head.back()) == [3]
    assert forks(served(head, 4, (*OTHER, 1))) == [(3, 20)]


def test_kept_sequences_go_least_recently_used_first() -> None:
    head = kept(places=1, slots=(70, 0))
    served(head, 2, OTHER)
    assert forks(served(head, 3, (*LONG, token_at(20), 5), 1)) == [(1, 21)]
    runs = served(head, 4, tuple(range(300, 330)), 2)
    assert freed(runs) == [2], "sequence 1 was used later"
    assert forks(served(head, 5, LONG, 1)) == [(1, 19)]


def test_kept_sequences_give_way_to_known_tokens() -> None:
    head = kept(places=1, slots=(40, 0))
    commands = head.submit(2, (1, 2, 3), 35) + head.until_idle()
    assert len(text(commands, 2)) == 35
    assert freed(bodies(commands, Run)) == [1]
    assert not [one for one in commands if isinstance(one, Note)], "nobody was preempted"


def test_kept_sequences_give_way_to_guesses() -> None:
    head = kept(places=1, slots=(26, 4), drafters=1)
    head.submit(2, (1, 2, 3), 20)
    head.trip()
    assert head.machine._pool._kept.keys() == {1}
    assert head.allocator.free_slots() == 30 - 21 - 4
    head.trip()
    head.trip()
    assert head.machine._pool._kept.keys() == set()
