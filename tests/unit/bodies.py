"""Strategies for the bodies of messages, made from LAYOUTS: one for each kind."""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import strategies as st

from pipeinfer.core.messages import Result, Run, SlotOpKind
from pipeinfer.core.wire import LAYOUTS, OPS, RESULTS, ROWS, TOKENS, TOP, Items, Layout

Real = st.SearchStrategy[float]
REAL32 = st.floats(width=32, allow_nan=False)


def numbers_of(form: struct.Struct, real: Real) -> list[st.SearchStrategy[Any]]:
    """A strategy for each number that ``form`` packs; ``real``: for its real ones."""
    bits = {"B": 8, "H": 16, "I": 32, "Q": 64}
    known: dict[str, st.SearchStrategy[Any]] = {letter: st.integers(0, 2**count - 1) for letter, count in bits.items()}
    known |= {"b": st.integers(-(2**7), 2**7 - 1), "i": st.integers(-(2**31), 2**31 - 1)}
    known |= {"?": st.booleans(), "f": real, "d": real}
    return [known[letter] for letter in form.format[1:] if letter != "x"]


def lists_of(items: Items, real: Real, least: int = 0, most: int = 4) -> st.SearchStrategy[Any]:
    numbers = numbers_of(items.item, real)
    if items is OPS:
        numbers[0] = st.sampled_from(SlotOpKind)
    one = st.builds(items.make, *numbers) if items.make else numbers[0]
    return st.lists(one, min_size=least, max_size=most).map(tuple)


def with_top(real: Real) -> Any:
    """The lists of a Result: rows, and of each row as many pairs as it says."""

    def with_rows(counts: list[int]) -> Any:
        rows = lists_of(RESULTS, real, len(counts), len(counts))
        counted = rows.map(lambda rows: tuple(map(lambda row, count: row._replace(top_count=count), rows, counts)))
        return st.tuples(counted, lists_of(TOP, real, sum(counts), sum(counts)))

    return st.lists(st.integers(0, 3), max_size=3).flatmap(with_rows)


def with_next_tokens(real: Real) -> Any:
    """The lists of a Run: operations, rows, and for each row a token, or none at all."""

    def with_rows(count: int) -> Any:
        rows, tokens = lists_of(ROWS, real, count, count), lists_of(TOKENS, real, count, count)
        return st.tuples(lists_of(OPS, real), rows, st.just(()) | tokens)

    return st.integers(0, 4).flatmap(with_rows)


WITH = {Result: with_top, Run: with_next_tokens}
"""Kinds whose lists belong together."""


def bodies_of(layout: Layout, real: Real) -> st.SearchStrategy[Any]:
    numbers = numbers_of(layout.fixed, real)[: layout.numbers]
    for place, members in layout.enums.items():
        numbers[place] = st.sampled_from(members)
    lists = st.tuples(*(lists_of(items, real) for items in layout.lists))
    if layout.kind in WITH:
        lists = WITH[layout.kind](real)
    return st.tuples(st.tuples(*numbers), lists).map(lambda drawn: layout.kind(*drawn[0], *drawn[1]))


def bodies(real: Real = REAL32) -> dict[type, st.SearchStrategy[Any]]:
    """By kind. ``real``: what real numbers may be; by default what 32 bits hold."""
    return {kind: bodies_of(layout, real) for kind, layout in LAYOUTS.items()}
