"""Text that streams is the text, whatever the characters and however the tokens are grouped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.core.errors import CheckpointError
from pipeinfer.text import StopStrings, Text

TEXT = Text(model_directory(BUILTIN, "target"))


def read(
    tokens: list[int], stops: list[str], groups: list[int], prompt: list[int] | None = None
) -> tuple[int, list[str], bool]:
    """How many tokens were taken, the pieces shown, and whether a stop string ended them."""
    reader, pieces, taken, index = TEXT.reader(frozenset(), stops, prompt or []), list[str](), 0, 0
    while tokens:
        size = groups[index % len(groups)]
        count, piece = reader.read(tokens[:size])
        taken, tokens, index = taken + count, tokens[size:], index + 1
        pieces.append(piece)
    pieces.append(reader.close())
    assert "".join(pieces) == reader.shown
    return taken, pieces, reader.is_stopped


GROUPS = st.lists(st.integers(1, 5), min_size=1)


@given(st.text(max_size=60), GROUPS)
def test_streaming_gives_the_whole_text(text: str, groups: list[int]) -> None:
    assert "".join(read(TEXT.encode(text), [], groups)[1]) == text


@given(st.lists(st.integers(0, 2047), max_size=40), GROUPS)
def test_any_tokens_stream_to_what_they_decode_to(tokens: list[int], groups: list[int]) -> None:
    assert "".join(read(tokens, [], groups)[1]) == TEXT.decode(tokens)


def test_half_a_character_is_held_back() -> None:
    halves = TEXT.encode("\N{SNOWMAN}")
    assert len(halves) > 1
    _, pieces, _ = read(halves, [], [1])
    assert pieces == [""] * (len(halves) - 1) + ["\N{SNOWMAN}", ""]


def test_an_answer_may_begin_within_a_character() -> None:
    *first, last = TEXT.encode("a\N{SNOWMAN}")
    assert TEXT.decode(first).endswith("\N{REPLACEMENT CHARACTER}")
    assert read([last], [], [1], first) == (1, ["\N{SNOWMAN}", ""], False)


def test_both_built_in_models_have_one_vocabulary() -> None:
    target, draft = (Text(model_directory(BUILTIN, part)).vocabulary() for part in ("target", "draft"))
    assert target == draft
    assert len(target) == 2048


def test_no_tokenizer_is_a_clear_error(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Text(tmp_path)


# Stop strings.


def first_stop(tokens: list[int], stops: list[str]) -> tuple[int, str, bool]:
    """What must come out, by the definition: the first token after which the text that is whole has a stop string in
    it, and the text before that string."""
    reader, text = TEXT.reader(frozenset(), []), ""
    for count, token in enumerate(tokens, 1):
        text += reader.read([token])[1]
        if places := [text.find(stop) for stop in stops if stop in text]:
            return count, text[: min(places)], True
    text += reader.close()
    places = [text.find(stop) for stop in stops if stop in text]
    return len(tokens), text[: min(places)] if places else text, bool(places)


FEW = st.text("abcé\N{SNOWMAN}\n ", min_size=1, max_size=4)


@given(st.text("abcé\N{SNOWMAN}\n ", max_size=40), st.lists(FEW, max_size=3), GROUPS)
def test_a_stop_string_ends_the_text_however_tokens_arrive(text: str, stops: list[str], groups: list[int]) -> None:
    tokens = TEXT.encode(text)
    count, shown, is_stopped = first_stop(tokens, stops)
    taken, pieces, was_stopped = read(tokens, stops, groups)
    assert (taken, "".join(pieces), was_stopped) == (count, shown, is_stopped)
    assert not any(stop in "".join(pieces) for stop in stops)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_exactly_the_possible_beginning_of_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    found, shown = StopStrings(stops), ""
    for count in range(1, len(text) + 1):
        shown += found.push(text[count - 1])
        so_far = text[:count]
        if found.is_reached:
            assert shown == so_far[: min(so_far.find(stop) for stop in stops if stop in so_far)]
            break
        assert not any(stop in so_far for stop in stops)
        begun = max(size for stop in stops for size in range(len(stop)) if so_far.endswith(stop[:size]))
        assert shown == so_far[: count - begun]


@pytest.mark.parametrize(
    ("stops", "letters", "shown"),
    [
        (["</s>"], "a </b></s>", ["a", " ", "", "", "</b", ">", "", "", "", ""]),
        (["aab"], "aaaab", ["", "", "a", "a", ""]),
        (["abcd", "bc"], "abcd", ["", "", "a", ""]),
        (["\n\n"], "x\ny\n\n", ["x", "", "\ny", "", ""]),
        ([], "ab", ["a", "b"]),
    ],
    ids=["tag", "overlap", "the-first-to-be-whole", "blank-line", "none"],
)
def test_what_may_be_a_stop_string_is_held_back(stops: list[str], letters: str, shown: list[str]) -> None:
    found = StopStrings(stops)
    assert [found.push(letter) for letter in letters] == shown


def test_what_was_held_back_for_nothing_comes_at_the_end() -> None:
    found = StopStrings(["stop"])
    assert (found.push("do not sto"), found.close(), found.is_reached) == ("do not ", "sto", False)


def test_a_token_that_brings_more_than_the_stop_string_is_the_last() -> None:
    (token,) = TEXT.encode("return")
    assert read([token] * 3, ["tur"], [3]) == (1, ["re", ""], True)


def test_silent_tokens_count_but_are_no_text() -> None:
    reader = TEXT.reader(frozenset({5}), ["a"])
    (letter,) = TEXT.encode("a")
    assert reader.read([5, 5, letter, 5]) == (3, "")
    assert reader.is_stopped
