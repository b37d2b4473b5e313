"""The pool of slots: what is kept, what is shared of it, and what goes."""

from __future__ import annotations

import random

import pytest

from kvbuffers.slot_allocator import SlotAllocator
from pipeinfer.core.ports import Request
from pipeinfer.orchestrator.pool import LEAST_SHARED, Pool
from pipeinfer.orchestrator.session import Session

PROMPT = tuple(range(20))


class Sessions:
    """A pool of ``slots``, and sessions that begin and end in it without a stage."""

    def __init__(self, slots: int, keeps: bool = True, speculative: int = 0) -> None:
        self.allocator = SlotAllocator(slots, speculative)
        self.pool = Pool(self.allocator, keeps)
        self.active: dict[int, Session] = {}
        self._begun = 0

    def begin(self, *text: int) -> int | None:
        """A session whose prompt is ``text``: how much of it was shared; its prompt is read at once."""
        session, sequence = Session(Request(text, 9), 0, 0, list(text)), self._begun + 1
        shared = self.pool.begin(session, sequence, self.active.values())
        self.allocator.check()
        if shared is not None:
            self._begun = sequence
            session.begin(sequence, 9)
            self.allocator.prompt_rows(sequence, text[shared:])
            session.prefilled, session.has_result = session.prompt, True
            self.active[sequence] = session
        return shared

    def end(self, sequence: int, is_whole: bool = True) -> None:
        self.pool.end(self.active.pop(sequence), is_whole)
        self.allocator.operations()
        self.allocator.check()

    @property
    def kept(self) -> list[int]:
        return [*self.pool._kept]


def test_a_prompt_needs_slots_for_itself_and_a_token_beside_what_others_need() -> None:
    for slots, found in ((10, None), (11, 0)):
        sessions = Sessions(slots)
        assert sessions.begin(1, 2, 3, 4) == 0
        assert sessions.begin(5, 6, 7, 8, 9) is found, "4 + 1 and 5 + 1"


def test_what_a_prompt_under_way_still_needs_is_left_to_it() -> None:
    sessions = Sessions(20)
    sessions.begin(1, 2)
    sessions.active[1].prompt += 10
    assert sessions.begin(1, 2, 3, 4, 5, 6, 7) is None
    assert sessions.begin(1, 2, 3, 4, 5, 6) == 0, "2 + 10 + 1 and 6 + 1"


@pytest.mark.parametrize("is_whole", [False, True])
def test_only_what_was_read_to_the_end_is_kept(is_whole: bool) -> None:
    sessions = Sessions(64)
    sessions.begin(*PROMPT)
    sessions.end(1, is_whole)
    assert sessions.kept == [1] * is_whole
    assert sessions.allocator.length(1) == 20 * is_whole


def test_guesses_of_a_kept_sequence_are_released() -> None:
    sessions = Sessions(64, speculative=4)
    sessions.begin(*PROMPT)
    sessions.allocator.lease(1, 3)
    sessions.end(1)
    assert sessions.allocator.counts() == (68 - 20, 0, 20)


def test_a_shorter_prefix_of_what_is_kept_already_does_not_hide_a_longer_one() -> None:
    sessions = Sessions(200)
    sessions.begin(*PROMPT)
    sessions.end(1)
    sessions.begin(*PROMPT, 50, 51, 52)
    sessions.end(2)
    assert sessions.begin(*PROMPT, 50, 51, 7) == 22
    assert sessions.begin(*PROMPT, 7) == 20


def test_the_source_of_a_fork_is_spared_if_others_suffice() -> None:
    sessions = Sessions(64)
    sessions.begin(*PROMPT)
    sessions.end(1)
    sessions.begin(*range(100, 120))
    sessions.end(2)
    assert sessions.begin(*PROMPT, *range(300, 330)) == 19
    assert sessions.kept == [1]


def test_the_source_goes_too_if_it_must() -> None:
    sessions = Sessions(60)
    sessions.begin(*range(30), *range(100, 120))
    sessions.end(1)
    assert sessions.begin(*range(20), *range(200, 235)) == 0, "20 are shared, but 30 more are kept"
    assert sessions.kept == []


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_common_prefix_is_shared(seed: int) -> None:
    rng, sessions = random.Random(seed), Sessions(2400)
    texts: dict[int, list[int]] = {}
    for sequence in range(1, 25):
        stem = rng.choice([*texts.values(), [rng.randrange(3) for _ in range(40)]])
        text = [*stem[: rng.randint(1, 60)], *(rng.randrange(2) for _ in range(rng.randint(0, 30)))]
        common = [0]
        for other in texts.values():
            # The last token of a text is not known to be sound.
            known = other[:-1]
            pairs = zip(known, text[:-1], strict=False)
            common.append(next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(known), len(text) - 1)))
        best = max(common)
        assert sessions.begin(*text) == (best if best >= LEAST_SHARED else 0), f"seed {seed}, sequence {sequence}"
        if len(text) > LEAST_SHARED:
            texts[sequence] = text
        if rng.random() < 0.5:
            sessions.end(sequence)
