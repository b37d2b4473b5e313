"""Incremental text of one answer: the final text, up to the first stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from pipeinfer.text.decoding import Chain


class StopStrings:
    """Lets text through up to the first of the strings ``stops``. Holds back what may yet turn out to be the beginning
    of one: always less than the longest of them."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=1)
        self._held = ""
        self.is_reached = False

    def push(self, text: str) -> str:
        """What can be shown now that ``text`` has come; nothing any more once a stop string is reached."""
        if self.is_reached:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.is_reached = True
            return self._let_go(min(places))
        for place in range(max(0, len(self._held) - self._longest + 1), len(self._held)):
            if any(stop.startswith(self._held[place:]) for stop in self._stops):
                return self._let_go(place)
        return self._let_go(len(self._held))

    def _let_go(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown

    def close(self) -> str:
        """The text that was held back, after the last token."""
        return "" if self.is_reached else self._let_go(len(self._held))


class Beyond:
    """Lets through what is left of a text without its common prefix with ``prompt``."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        self._common = 0  # characters, so far

    def push(self, text: str) -> str:
        """The part of ``text``, the next of the whole, that is beyond."""
        if self._common < 0:
            return text
        rest = self._prompt[self._common : self._common + len(text)]
        if text == rest:
            count = len(text)
        else:
            pairs = enumerate(zip(text, rest, strict=False))
            count = next((place for place, (ours, theirs) in pairs if ours != theirs), len(rest))
        self._common = -1 if count < len(text) else self._common + count
        return text[count:]


class Source(Protocol):
    """Turns an answer's tokens to text."""

    @property
    def is_reached(self) -> bool:
        """Whether a stop string has ended the answer."""
        ...

    def push(self, token: int) -> str:
        """What can be shown now that ``token`` has come."""
        ...

    def close(self) -> str:
        """What is left when no more tokens will come."""
        ...


class Streamed:
    """Text that is shown as soon as no later token can change it. ``chain`` decodes, ``name`` gives a token's string
    (None: it is no text); ``prompt`` and its text come before the answer."""

    def __init__(
        self,
        chain: Chain,
        name: Callable[[int], str | None],
        prompt: Iterable[int],
        prompt_text: str,
        stops: Sequence[str],
    ) -> None:
        self._chain, self._name = chain, name
        self._beyond, self._filter = Beyond(prompt_text), StopStrings(stops)
        names = [string for token in prompt if (string := name(token)) is not None]
        self._beyond.push(chain.push(names))

    @property
    def is_reached(self) -> bool:
        """See Source."""
        return self._filter.is_reached

    def push(self, token: int) -> str:
        """See Source."""
        string = self._name(token)
        return "" if string is None else self._filter.push(self._beyond.push(self._chain.push([string])))

    def close(self) -> str:
        """See Source."""
        return self._filter.push(self._beyond.push(self._chain.close())) + self._filter.close()


class Whole:
    """Text of which any token may change any part: it is shown at the end. A stop string ends it at the token after
    which the text has it."""

    def __init__(
        self, decode: Callable[[list[int]], str], prompt: Iterable[int], prompt_text: str, stops: Sequence[str]
    ) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._tokens, self._prompt_text = list(prompt), prompt_text
        self.is_reached = False

    def _text(self) -> str:
        text = Beyond(self._prompt_text).push(self._decode(self._tokens))
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self.is_reached = bool(ends)
        return text[: min(ends, default=len(text))]

    def push(self, token: int) -> str:
        """See Source."""
        self._tokens.append(token)
        if self._stops:
            self._text()
        return ""

    def close(self) -> str:
        """See Source."""
        return self._text()


class Reader:
    """Reads an answer up to the token that completes a stop string. Tokens in ``silent`` are no text.

    It takes tokens one by one, so that where an answer ends does not depend on how they arrived. ``guarded`` makes a
    context in which text is decoded, for errors to be told in it."""

    def __init__(
        self, source: Source, silent: frozenset[int], guarded: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._source = source
        self._silent = silent
        self._guarded = guarded
        self._is_closed = False
        self.shown = ""  # the text so far; after close, the answer's

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._source.is_reached

    def read(self, tokens: Sequence[int]) -> tuple[int, str]:
        """How many of ``tokens`` belong to the answer, and what can be shown now that they have come."""
        piece, count = "", 0
        with self._guarded():
            for token in tokens:
                if self.is_stopped:
                    break
                count += 1
                if token not in self._silent:
                    piece += self._source.push(token)
        self.shown += piece
        return count, piece

    def close(self) -> str:
        """What is left when no more tokens will come; nothing when asked again."""
        if self._is_closed:
            return ""
        self._is_closed = True
        with self._guarded():
            piece = self._source.close()
        self.shown += piece
        return piece
