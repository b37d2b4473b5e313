"""Text that streams is the text, whatever the characters and however the tokens are grouped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeinfer.config import BUILTIN, model_directory
from pipeinfer.errors import CheckpointError
from pipeinfer.text import Text, vocabulary

TEXT = Text(model_directory(BUILTIN, "target"))


@given(st.text(max_size=60), st.lists(st.integers(1, 5), min_size=1))
def test_streaming_gives_the_whole_text(text: str, groups: list[int]) -> None:
    tokens = TEXT.encode(text)
    stream, shown, index = TEXT.stream(), "", 0
    while tokens:
        size = groups[index % len(groups)]
        piece, tokens, index = tokens[:size], tokens[size:], index + 1
        shown += stream.push(piece)
    assert shown + stream.close() == text


@given(st.lists(st.integers(0, 2047), max_size=40))
def test_any_tokens_stream_to_what_they_decode_to(tokens: list[int]) -> None:
    stream = TEXT.stream()
    shown = "".join(stream.push([token]) for token in tokens)
    assert shown + stream.close() == TEXT.decode(tokens)


def test_half_a_character_is_held_back() -> None:
    halves = TEXT.encode("\N{SNOWMAN}")
    assert len(halves) > 1
    stream = TEXT.stream()
    assert [stream.push([half]) for half in halves[:-1]] == [""] * (len(halves) - 1)
    assert stream.push(halves[-1:]) == "\N{SNOWMAN}"


def test_both_built_in_models_have_one_vocabulary() -> None:
    target, draft = (vocabulary(model_directory(BUILTIN, part)) for part in ("target", "draft"))
    assert target == draft
    assert len(target) == 2048


def test_no_tokenizer_is_a_clear_error(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Text(tmp_path)
