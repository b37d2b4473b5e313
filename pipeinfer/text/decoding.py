"""Incremental decoding: the text of a tokenizer's decoder, emitted as soon as no later token can change it.

A decoder of the ``tokenizers`` library is a chain of small ones, each from a list of strings to a list of strings. Here
each is a stage that takes its input a few strings at a time and passes on what is final, so that a token costs the same
wherever it stands. `chain` knows which decoders can be had that way; any other must be given the whole text.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

REPLACED = "\N{REPLACEMENT CHARACTER}"
CLEANED = " .?!,'ntmsver"  # the characters of what transformers' clean_up_tokenization replaces
SHOWN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # GPT-2's bytes that are their own letters
LETTERS = {chr(byte): byte for byte in SHOWN}
LETTERS |= {chr(0x100 + n): byte for n, byte in enumerate(byte for byte in range(0x100) if byte not in SHOWN)}


class Stage(Protocol):
    """A decoder that takes its input a few strings at a time."""

    def push(self, strings: list[str]) -> list[str]:
        """The output that becomes final with ``strings``."""
        ...

    def close(self) -> list[str]:
        """The rest, after the last string."""
        ...


class Each:
    """Decodes string by string with ``decode``. ``lead`` is put before all but the first, for decoders that treat the
    first otherwise."""

    def __init__(self, decode: Callable[[list[str]], str], lead: Sequence[str] = ()) -> None:
        self._decode = decode
        self._lead = list(lead)
        self._is_first = True

    def push(self, strings: list[str]) -> list[str]:
        """See Stage."""
        found = []
        for string in strings:
            found.append(self._decode([string] if self._is_first else [*self._lead, string]))
            self._is_first = False
        return found

    def close(self) -> list[str]:
        """See Stage."""
        return []


class Joined:
    """Puts blanks between strings, as is done where a tokenizer has no decoder."""

    def __init__(self) -> None:
        self._blank = ""

    def push(self, strings: list[str]) -> list[str]:
        """See Stage."""
        found = []
        for string in strings:
            found.append(self._blank + string)
            self._blank = " "
        return found

    def close(self) -> list[str]:
        """See Stage."""
        return []


class LastApart:
    """Decodes string by string with ``decode``, which treats the last otherwise."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode = decode
        self._held: list[str] = []

    def push(self, strings: list[str]) -> list[str]:
        """See Stage."""
        held = [*self._held, *strings]
        self._held = held[-1:]
        return [self._decode([string, ""]) for string in held[:-1]]

    def close(self) -> list[str]:
        """See Stage."""
        return [self._decode([string]) for string in self._held]


class Distinct:
    """Decodes with ``decode`` each string that differs from the one before."""

    def __init__(self, decode: Callable[[list[str]], str]) -> None:
        self._decode = decode
        self._last: str | None = None

    def push(self, strings: list[str]) -> list[str]:
        """See Stage."""
        found = []
        for string in strings:
            if string != self._last:
                found.append(self._decode([string]))
            self._last = string
        return [string for string in found if string]

    def close(self) -> list[str]:
        """See Stage."""
        return []


class ByteRuns:
    """Turns a run of tokens such as ``<0xE2>`` to the text of these bytes; where they are none, to a replacement
    character each. So a run says nothing before it ends."""

    _BYTE = re.compile(r"<0x(\+[0-9A-Fa-f]|[0-9A-Fa-f]{2})>")  # the library reads a sign, too

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, strings: list[str]) -> list[str]:
        """See Stage."""
        found = []
        for string in strings:
            if byte := self._BYTE.fullmatch(string):
                self._run.append(int(byte[1], 16))
            else:
                found += [*self.close(), string]
        return found

    def close(self) -> list[str]:
        """See Stage."""
        run, self._run = self._run, bytearray()
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return [REPLACED] * len(run)


class ByteLetters:
    """Turns letters that stand for bytes (LETTERS) to the text of these bytes; holds back what is not yet a whole
    character."""

    def __init__(self) -> None:
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, strings: list[str]) -> list[str]:
        """See Stage."""
        return [self._characters.decode(b"".join(map(self._bytes, strings)))]

    def _bytes(self, string: str) -> bytes:
        try:
            return bytes(map(LETTERS.__getitem__, string))
        except KeyError:  # an added token, written as it is
            return string.encode()

    def close(self) -> list[str]:
        """See Stage."""
        return [self._characters.decode(b"", final=True)]


class Trimmed:
    """Takes up to ``start`` characters ``content`` from the beginning of a text and up to ``stop`` from its end."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop = content, start, stop
        self._held = ""

    def push(self, strings: list[str]) -> list[str]:
        """See Stage."""
        text = self._held + "".join(strings)
        while self._start and text:
            if text[0] != self._content:
                self._start = 0
                break
            text, self._start = text[1:], self._start - 1
        end = min(self._stop, len(text) - len(text.rstrip(self._content)))
        self._held = text[len(text) - end :]
        return [text[: len(text) - end]]

    def close(self) -> list[str]:
        """See Stage."""
        return []


class Rewritten:
    """Applies ``rewrite``, which replaces fixed strings made of the characters in ``touched``: what ends in any other
    character is final."""

    def __init__(self, rewrite: Callable[[str], str], touched: str) -> None:
        self._rewrite, self._touched = rewrite, touched
        self._held = ""

    def push(self, strings: list[str]) -> list[str]:
        """See Stage."""
        text = self._held + "".join(strings)
        end = len(text.rstrip(self._touched))
        self._held = text[end:]
        return [self._rewrite(text[:end])]

    def close(self) -> list[str]:
        """See Stage."""
        return [self._rewrite(self._held)]


class Chain:
    """Stages one after the other, from tokens to text."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages

    def push(self, tokens: list[str]) -> str:
        """The text that becomes final with ``tokens``."""
        for stage in self._stages:
            tokens = stage.push(tokens)
        return "".join(tokens)

    def close(self) -> str:
        """The rest, after the last token."""
        rest: list[str] = []
        for stage in self._stages:
            rest = stage.push(rest) + stage.close()
        return "".join(rest)


def chain(decoder: dict[str, Any] | None, clean_up: Callable[[str], str] | None) -> Chain | None:
    """The stages of ``decoder`` (as tokenizer.json writes it; None: there is none), then ``clean_up``, which replaces
    nothing but strings of the characters CLEANED. None where later tokens may change any of the text."""
    stages: list[Stage] = []
    is_one_text = False  # from a stage on that makes one string of all
    for part in _flat(decoder):
        if part["type"] in ("ByteLevel", "Fuse") and not is_one_text:
            stages += [ByteLetters()] if part["type"] == "ByteLevel" else []
            is_one_text = True
        elif part["type"] != "Fuse":
            stage = _of_text(part) if is_one_text else _of_tokens(part)
            if stage is None:
                return None
            stages.append(stage)
    if decoder is None:
        stages.append(Joined())
    if clean_up is not None:
        stages.append(Rewritten(clean_up, CLEANED))
    return Chain(stages)


def _flat(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is not None:
        if decoder["type"] == "Sequence":
            for part in decoder["decoders"]:
                yield from _flat(part)
        else:
            yield decoder


def _of_tokens(part: dict[str, Any]) -> Stage | None:
    match part:
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content} if pattern:
            return Each(lambda strings: strings[-1].replace(pattern, content))
        case {"type": "Replace" | "Strip"}:
            return Each(_library(part))
        case {"type": "Metaspace" | "WordPiece"}:
            return Each(_library(part), [""])
        case {"type": "BPEDecoder"}:
            return LastApart(_library(part))
        case {"type": "CTC"}:
            return Distinct(_library(part))
        case {"type": "ByteFallback"}:
            return ByteRuns()
    return None


def _of_text(part: dict[str, Any]) -> Stage | None:
    match part:
        case {"type": "Strip", "content": content, "start": start, "stop": stop}:
            return Trimmed(content, start, stop)
        case {"type": "Replace", "pattern": {"String": pattern}, "content": content} if pattern:
            return Rewritten(lambda text: text.replace(pattern, content), pattern)
    return None


def _library(part: dict[str, Any]) -> Callable[[list[str]], str]:
    """The library's own decoder for one part of a chain."""
    from tokenizers import Tokenizer

    empty = {"type": "BPE", "vocab": {}, "merges": []}
    holder = {"version": "1.0", "model": empty, "added_tokens": [], "decoder": part}
    decoder = Tokenizer.from_str(json.dumps(holder)).decoder
    return lambda strings: str(decoder.decode(strings))
