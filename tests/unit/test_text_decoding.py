"""What a stage of a decoder shows is what the whole decoder says, wherever its input is cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders
from transformers import PreTrainedTokenizerBase

from pipeinfer.text.decoding import CLEANED, Rewritten, Trimmed, chain

PARTS = {
    "byte letters": decoders.ByteLevel(),
    "byte runs": decoders.ByteFallback(),
    "words": decoders.WordPiece(),
    "words kept": decoders.WordPiece(prefix="l", cleanup=False),
    "blank first": decoders.Metaspace(prepend_scheme="never"),
    "no blank first": decoders.Metaspace(prepend_scheme="always"),
    "suffix": decoders.BPEDecoder(suffix="l"),
    "repeats": decoders.CTC(pad_token="l", word_delimiter_token="|"),
    "pattern": decoders.Replace(Regex("l+"), "x"),
    "llama": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "text": decoders.Sequence([decoders.Fuse(), decoders.Replace("l▁", ""), decoders.Replace("▁a", "l")]),
    "nested": decoders.Sequence([decoders.Sequence([decoders.Strip("▁", 1, 0)]), decoders.BPEDecoder(suffix="a")]),
}
NAMES = ["l", "ll", "▁a", "▁", "a", "<0xE2>", "<0x98>", "<0x83>", "<0x+A>", "<0xG>", "â", "ĺ", "ĥ", "☃", "##a", "|", ""]
TOKENS = st.lists(st.sampled_from(NAMES), max_size=12)


def clean(text: str) -> str:
    return PreTrainedTokenizerBase.clean_up_tokenization(PreTrainedTokenizerBase, text)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PARTS)
@given(tokens=TOKENS)
def test_token_by_token_is_the_whole(name: str, tokens: list[str]) -> None:
    found = chain(json.loads(PARTS[name].__getstate__()), None)
    assert found is not None
    if tokens:  # some decoders fail where there is nothing
        assert "".join(found.push([token]) for token in tokens) + found.close() == PARTS[name].decode(tokens)


@given(tokens=TOKENS)
def test_ends_are_trimmed_as_the_library_does(tokens: list[str]) -> None:
    ends = decoders.Sequence([decoders.Fuse(), decoders.Strip("l", 2, 0), decoders.Strip("l", 0, 2)])
    tokens = ["ll", "x", *tokens]  # the library fails where too little is left
    found = chain(json.loads(ends.__getstate__()), None)
    assert found is not None
    assert "".join(found.push([token]) for token in tokens) + found.close() == ends.decode(tokens)


@given(st.lists(st.text(CLEANED + "a", max_size=4), max_size=8))
def test_what_may_be_cleaned_up_is_held_back(pieces: list[str]) -> None:
    stage = Rewritten(clean, CLEANED)
    shown = [string for piece in pieces for string in stage.push([piece])]
    assert "".join([*shown, *stage.close()]) == clean("".join(pieces))


def test_clean_up_is_made_of_the_characters_we_know() -> None:
    """Were transformers to clean up more, one of these pairs would show it."""
    others = [chr(code) for code in range(0x20, 0x7F) if chr(code) not in CLEANED]
    for first, second in [*pairwise(others), *((" ", other) for other in others), *((other, " ") for other in others)]:
        assert clean(first + second) == first + second


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a"), "b")]),
        decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]),
        decoders.Sequence([decoders.ByteLevel(), decoders.ByteLevel()]),
        decoders.Sequence([decoders.Fuse(), decoders.CTC()]),
    ],
    ids=str,
)
def test_a_decoder_that_may_change_any_of_its_text_is_known(decoder: decoders.Sequence) -> None:
    assert chain(json.loads(decoder.__getstate__()), None) is None


def test_no_decoder_puts_blanks_between_tokens() -> None:
    found = chain(None, None)
    assert found is not None
    assert [found.push(["a"]), found.push(["b", "c"]), found.close()] == ["a", " b c", ""]


def test_only_what_may_be_trimmed_is_held_back() -> None:
    stage = Trimmed("l", 1, 2)
    assert [stage.push([piece]) for piece in ["l", "al", "ll", "a", "l"]] == [[""], ["a"], ["l"], ["lla"], [""]]
    assert stage.close() == []
