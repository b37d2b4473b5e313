"""What was said before is proposed again: the longest match first, then the most frequent, then the latest."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speculation.trees.lookup import CANDIDATES, CLAIMS, EVIDENCE, LONGEST_MATCH, RANKS, Guess, Lookup, rank_of
from tests.unit.effort import lines_of

TEXTS = st.lists(st.integers(0, 2), max_size=40)


def lookup(text: Sequence[int], shortest: int = 2, longest: int = 8, most_tokens: int = 64) -> Lookup:
    made = Lookup(shortest, longest, most_tokens)
    made.extend(text)
    return made


def tokens(guesses: list[Guess]) -> list[int]:
    return [guess.token for guess in guesses]


def said(text: str, tail: str = "", count: int = 8) -> str:
    made = lookup([ord(letter) for letter in text + tail])
    return "".join(map(chr, tokens(made.propose(count))))


def agreement(text: Sequence[int], end: int) -> int:
    """How many tokens before ``end`` equal those at the text's end."""
    length = 0
    while length < min(end, LONGEST_MATCH) and text[end - 1 - length] == text[len(text) - 1 - length]:
        length += 1
    return length


def by_brute_force(text: Sequence[int], count: int, shortest: int) -> list[Guess]:
    """The same by comparing everything with everything."""
    longer = list(text)
    lengths = {end: agreement(text, end) for end in range(len(text) - 1, 0, -1)}  # the latest first
    longest = max(lengths.values(), default=0)
    ends = [end for end, length in lengths.items() if length == longest]
    guesses: list[Guess] = []
    while longest >= shortest and len(guesses) < count:
        votes = Counter(longer[end] for end in ends)
        token, most = votes.most_common(1)[0]  # the first of equals
        guesses.append(Guess(token, rank_of((longest + len(guesses)) * most / len(ends))))
        ends = [end + 1 for end in ends if longer[end] == token]
        longer.append(token)
    return guesses


def test_what_followed_is_proposed_again() -> None:
    assert said("the cat sat. the c", count=5) == "at sa"
    assert said("abcd") == ""
    assert said("") == ""
    assert said("abxab", count=0) == ""


def test_one_token_is_no_match_by_default() -> None:
    assert said("axa") == ""
    assert tokens(lookup([1, 9, 1], shortest=1).propose(1)) == [9]


def test_a_run_goes_on_beyond_the_end_of_the_text() -> None:
    assert said("abab", count=7) == "abababa"
    assert said("aaa", count=4) == "aaaa"
    assert said("xabcabc", count=8) == "abcabcab"


def test_the_longest_match_wins_over_a_later_one() -> None:
    assert said("xyzab1 .ab2 .ab2 .xyzab", count=1) == "1"


def test_among_equal_matches_the_most_frequent_wins_then_the_latest() -> None:
    assert said("1ab.2ab.3ab!4ab", count=1) == "."
    assert said("1ab.2ab!3ab", count=1) == "!"


def test_a_vote_counts_as_long_as_its_text_is_remembered() -> None:
    old, new = [1, 2, 9, 3, 1, 2, 9, 4], [1, 2, 8, 5, 1, 2]
    filler = range(100, 164 - len(old) - len(new))
    made = lookup([*old, *filler, *new], most_tokens=64)
    assert tokens(made.propose(1)) == [9]
    made.extend([6, 1, 2])
    assert tokens(made.propose(1)) == [6]


def test_a_match_ends_where_the_text_was_forgotten() -> None:
    text = [7, 1, 2, 3, 0, 7, 1, 2, 4, 5, 7, 1, 2]
    assert lookup(text, most_tokens=len(text)).propose(1) == [(4, rank_of(3 / 2))]
    assert lookup(text, most_tokens=len(text) - 1).propose(1) == [(4, rank_of(3))]


def test_a_long_match_is_found_behind_many_short_ones() -> None:
    far = [1, 2, 3, 4, 5, 6, 7, 8, 99]
    near = [7, 8, 55] * (2 * CANDIDATES)
    assert tokens(lookup(far + near + far[:-1], most_tokens=256).propose(1)) == [99]


def test_the_rank_falls_with_the_match_and_along_the_chain() -> None:
    for length in (2, 5, 9, 31, 60):
        text = list(range(100, 100 + length))
        chain = lookup([*text, *range(10), *text], most_tokens=256).propose(10)
        assert tokens(chain) == list(range(10))
        assert [guess.rank for guess in chain] == [rank_of(min(length, LONGEST_MATCH) + depth) for depth in range(10)]
    assert [rank_of(evidence) for evidence in (2, *EVIDENCE, 1000)] == [7, 6, 5, 4, 3, 2, 1, 0, 0]


def test_disagreement_takes_away_from_the_rank() -> None:
    same = [1, 2, 3, 4, 5, 6]
    agreed = lookup([0, *same, 9, 10, *same, 9, 11, *same]).propose(1)
    parted = lookup([0, *same, 8, 10, *same, 9, 11, *same]).propose(1)
    assert agreed == [(9, rank_of(6))]
    assert parted == [(9, rank_of(3))]


def test_a_longer_match_claims_more() -> None:
    assert len(CLAIMS) == RANKS == len(EVIDENCE) + 1
    assert sorted(CLAIMS, reverse=True) == list(CLAIMS)
    assert all(0 < math.exp(claim) < 1 for claim in CLAIMS)


@given(TEXTS, st.integers(0, 12), st.integers(1, 3))
def test_it_finds_what_comparing_everything_finds(text: list[int], count: int, shortest: int) -> None:
    made = lookup(text, shortest)
    found, expected = made.propose(count), by_brute_force(text, count, shortest)
    ends = [end for end in range(1, len(text)) if agreement(text, end) >= shortest]
    if len(ends) <= CANDIDATES:  # it looks at no more of them
        assert found == expected
    else:
        assert len(found) == len(expected)


@given(TEXTS, TEXTS, st.integers(0, 12))
def test_a_proposal_leaves_no_trace(text: list[int], tail: list[int], count: int) -> None:
    made = lookup(text, most_tokens=128)
    assert made.propose(count) == made.propose(count)
    made.extend(tail)
    assert made.propose(count) == lookup(text + tail, most_tokens=128).propose(count)


@given(st.lists(st.integers(0, 3), max_size=200), st.integers(1, 20))
def test_the_oldest_is_forgotten_and_nothing_else(text: list[int], most: int) -> None:
    made = lookup(text, most_tokens=most)
    kept = text[-most:]
    ends = [end for end in range(1, len(kept)) if agreement(kept, end) >= 2]
    assert len(made) == len(kept)
    if len(ends) <= CANDIDATES:
        assert made.propose(4) == by_brute_force(kept, 4, 2)


@given(TEXTS, TEXTS)
def test_a_cleared_lookup_is_a_new_one(old: list[int], text: list[int]) -> None:
    made = lookup(old, most_tokens=64)
    made.clear()
    assert not len(made) and made.propose(4) == []
    made.extend(text)
    assert made.propose(4) == lookup(text).propose(4)


@pytest.mark.parametrize("wrong", [(0, 8, 9), (3, 2, 9), (2, LONGEST_MATCH + 1, 9), (2, 8, 0)], ids=str)
def test_nonsense_is_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="shortest|most_tokens"):
        Lookup(*wrong)


def test_memory_is_bounded_as_promised() -> None:
    text = [token % 997 for token in range(40000)]
    tracemalloc.start()
    made = Lookup(most_tokens=4096)
    made.extend(text)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(made) == 4096
    assert used < 4096 * (3 * 24 + 1.25 * 16)


@pytest.mark.parametrize("alphabet", [1, 3, 1000])
def test_it_is_little_work_on_any_text(alphabet: int) -> None:
    draws = random.Random(0)
    text = [draws.randrange(alphabet) for _ in range(8000)]
    made = lookup(text, most_tokens=8192)
    assert lines_of(lambda: made.propose(8)) < 600
    assert lines_of(lambda: made.extend(text[:10])) < 300
