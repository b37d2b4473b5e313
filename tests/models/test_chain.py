"""Chains of guesses give plain decoding's tokens, whatever the draft says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipeinfer.bench.chain import decode


class Sums:
    """A model whose next token is a sum over the text, wrong in every ``wrong``-th one; it holds what it was given."""

    def __init__(self, wrong: int = 0) -> None:
        self._wrong = wrong
        self._text: list[int] = []
        self.passes: list[int] = []

    def choices(self, tokens: Sequence[int], first: int, wanted: int) -> list[int]:
        assert 0 <= first <= len(self._text), "a token is missing before these"
        assert 1 <= wanted <= len(tokens)
        self._text[first:] = tokens
        self.passes.append(len(tokens))
        return [self._next(len(self._text) - back) for back in range(wanted - 1, -1, -1)]

    def _next(self, length: int) -> int:
        found = (sum(self._text[:length]) * 31 + length) % 101
        return (found + 1) % 101 if self._wrong and length % self._wrong == 0 else found


PROMPT = [3, 1, 4, 1, 5]


@pytest.mark.parametrize("wrong", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 4, 9])
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_the_tokens_are_those_of_plain_decoding(wrong: int, length: int, count: int) -> None:
    plain = decode(Sums(), None, PROMPT, count)
    emitted: list[int] = []
    target = Sums()
    assert decode(target, Sums(wrong), PROMPT, count, length, emitted.append) == plain
    assert (len(plain), sum(emitted)) == (count, count)
    assert max(target.passes[1:], default=1) <= length + 1
    if wrong == 0 and count > 1:
        assert len(emitted) == 1 + -(-(count - 1) // (length + 1))
    if wrong == 1:
        assert emitted == [1] * count
