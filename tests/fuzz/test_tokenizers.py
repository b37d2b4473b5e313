"""A part of the fuzz of tokenizers; the long run is in tests/fuzz/tokenizers.py."""

from __future__ import annotations

import pytest

from tests.fuzz.tokenizers import fuzz

PART = 75  # inputs: about two seconds


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_tokens_and_text_are_those_of_transformers(seed: int) -> None:
    outcomes = fuzz(seed, range(PART))
    assert outcomes.total() == PART
    seen = {word for outcome in outcomes for word in outcome.replace(",", "").split()}
    assert {"Plain", "Full", "streamed", "whole", "refused"} <= seen, "the fuzz has lost a kind of tokenizer"
