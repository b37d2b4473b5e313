"""Lookup: guesses that cost no model, copied from where the text has said the same before.

The longest suffix of the text that occurred earlier is found, and what followed it there is proposed again (prompt
lookup decoding, Saxena 2023; suffix decoding, Oliaro et al. 2024, arXiv:2411.04975). Suffix trees find every occurrence
and pay for it in memory. Here the index is that of LZ77 compressors (RFC 1951, section 4): for a few gram lengths, a
hash table of the last position and a ring of links to the positions before it. Hashes only say where to look: every
match is compared token by token, and lengthened backwards as far as it goes.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

LONGEST_MATCH = 32
"""Matches are told apart up to this length; more than that is simply long."""
CANDIDATES = 8
"""Earlier positions of one gram that are looked at, the latest first; with 32 the guesses are hardly better."""
EVIDENCE = (3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 32.0)
"""Where the ranks part: a guess has rank 7 below the first, rank 0 from the last on (tokens of agreeing context)."""
CLAIMS = tuple(math.log(share) for share in (0.95, 0.93, 0.83, 0.79, 0.71, 0.66, 0.58, 0.34))
"""By rank, what a guess may claim before anything is known of this text: its log-probability (natural log), given that
the guesses before it in the chain were right. Measured on 52516 tokens of Python and of this project's prose."""
RANKS = len(CLAIMS)


class Guess(NamedTuple):
    """A proposed token. ``rank``, 0 to 7, tells how much agreed: 0 is the longest match; calibration says what it is
    worth."""

    token: int
    rank: int


class Lookup:
    """An index of the last ``most_tokens`` tokens of a text, for matches of ``shortest`` tokens or more.

    The grams of ``shortest`` tokens, of its doubles below ``longest``, and of ``longest`` are hashed, which is what
    ``extend`` costs: O(longest) per token for each of those lengths. A match is looked for among the CANDIDATES latest
    occurrences of each, so one of ``longest`` or more is found even where many shorter ones are more recent.

    Memory: for each of ``most_tokens``, 24 to 48 bytes per hashed length, all of it at construction (a few ms), and up
    to 20 for the text, whose integers are the caller's: 3 MB for 32768 tokens and the default lengths. ValueError if
    the lengths are not 1 <= shortest <= longest <= LONGEST_MATCH, or if ``most_tokens`` is not positive.
    """

    def __init__(self, shortest: int = 2, longest: int = 8, most_tokens: int = 32768) -> None:
        if not 1 <= shortest <= longest <= LONGEST_MATCH:
            raise ValueError(f"a match needs 1 <= shortest <= longest <= {LONGEST_MATCH}, not {shortest} and {longest}")
        if most_tokens < 1:
            raise ValueError(f"most_tokens must be positive, not {most_tokens}")
        lengths = [longest]
        while (length := shortest << len(lengths) - 1) < longest:
            lengths.insert(1, length)
        size = 1 << (most_tokens - 1).bit_length()
        self._most = most_tokens
        self._ring = size - 1
        self._mask = 2 * size - 1
        # By gram length, the longest first. Positions count from 1 and from the first text on, so that 0 is none and
        # whatever was cleared or overwritten is recognised by being too old.
        self._tables = [(n, array("q", bytes(16 * size)), array("q", bytes(8 * size))) for n in lengths]
        self._text: list[int] = []
        self._base = 1  # the position of the text's first token

    def __len__(self) -> int:
        """Tokens that are remembered, at most ``most_tokens``."""
        return min(len(self._text), self._most)

    def clear(self) -> None:
        """Begin another text, in constant time: old positions are too old from now on."""
        self._base += len(self._text)
        self._text = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Append ``tokens`` to the text; about a microsecond each. Beyond ``most_tokens`` the oldest are forgotten."""
        text, tables, mask, ring = self._text, self._tables, self._mask, self._ring
        position = self._base + len(text)
        for token in tokens:
            text.append(token)
            for length, heads, links in tables:
                if len(text) >= length:
                    slot = hash(tuple(text[-length:])) & mask  # of integers: the same in every process
                    links[position & ring] = heads[slot]
                    heads[slot] = position
            position += 1
            if len(text) >= 2 * self._most:
                del text[: -self._most]
                self._base = position - self._most

    def propose(self, count: int) -> list[Guess]:
        """The next tokens, ``count`` at most: a chain, each guess after the one before it. Empty without a match."""
        committed = len(self._text)
        try:
            return self._chain(count)
        finally:
            del self._text[committed:]  # the chain stood there, so that a source may run past the text's end into it

    def _chain(self, count: int) -> list[Guess]:
        """Follow the sources while they agree; where they part go with the most, and among equals with the latest.

        If a guess is right, the match behind the next one is a token longer, so the evidence grows along the chain.
        Sources that disagree take away from it: a match is worth its length times the share that goes on like this.
        """
        text = self._text
        sources, length = self._sources()
        guesses: list[Guess] = []
        while sources and len(guesses) < count:
            said = [text[place + 1] for place in sources]
            token, votes = said[0], said.count(said[0])
            if votes < len(said):
                token, votes = max(Counter(said).items(), key=itemgetter(1))  # the first of equals, hence the latest
            guesses.append(Guess(token, rank_of(length * votes / len(said))))
            text.append(token)
            sources = [place + 1 for place, next_token in zip(sources, said, strict=True) if next_token == token]
            length += 1
        return guesses

    def _sources(self) -> tuple[list[int], int]:
        """Where (indices into the text) the longest match ends, the latest first, and its length."""
        text = self._text
        last = len(text) - 1
        oldest = max(0, len(text) - self._most)
        for length, heads, links in self._tables:
            first = oldest + length - 1  # the first index at which a gram can end
            if last <= first:
                continue
            gram = text[-length:]
            places: list[int] = []
            position = heads[hash(tuple(gram)) & self._mask]
            for _ in range(2 * CANDIDATES):  # steps are bounded too, whatever else hashes to the same slot
                place = position - self._base
                if place < first or len(places) >= CANDIDATES:
                    break
                if place < last and text[place - length + 1 : place + 1] == gram:
                    places.append(place)
                position = links[position & self._ring]
            if places:
                return self._longest(places, length, oldest)
        return [], 0

    def _longest(self, places: list[int], length: int, oldest: int) -> tuple[list[int], int]:
        """Those of ``places`` that agree with the text's end for longest; they all do for ``length`` tokens."""
        text = self._text
        last = len(text) - 1
        kept: list[int] = []
        suffix = text[-length:]
        for place in places:
            if place - length + 1 < oldest or text[place - length + 1 : place + 1] != suffix:
                continue  # shorter than the best so far
            longer = length
            while longer < LONGEST_MATCH and place - longer >= oldest and text[place - longer] == text[last - longer]:
                longer += 1
            if longer > length:
                kept, length, suffix = [], longer, text[-longer:]
            kept.append(place)
        return kept, length


def rank_of(evidence: float) -> int:
    """The rank of a guess behind which ``evidence`` tokens of context agree: 0 for the most, 7 for the least."""
    return len(EVIDENCE) - bisect_right(EVIDENCE, evidence)
