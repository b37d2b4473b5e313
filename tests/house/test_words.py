"""One concept has one name, the field's: old names do not come back. docs/ARCHITECTURE.md has the glossary."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.house.source import checkout, text

# What is searched: text files. What is not: the log and the changelog report the past, results keep the keys that they
# were recorded with, prompts and models are data, and this file lists the words.
WRITTEN = (".md", ".py", ".toml", ".txt", ".sh", ".sbatch", "Makefile", "run")
NOT_SEARCHED = ("docs/log.md", "CHANGELOG.md", "benchmarks/results/", "pipeinfer/builtin/", "tests/house/test_words.py")
DATA = ("corpora", "prompts")

# Regular expression of an old word -> today's name. Underscores count as the ends of words, as do capitals.
OLD = {
    r"[Cc]ells?": "slot (KV slot)",
    r"CellTable|CELLTABLE": "SlotTable",
    r"CellOps?": "SlotOp",
    r"[Ll]edgers?": "SlotAllocator",
    r"Partitions": "SlotAllocator",
    r"partitions\.py": "kvbuffers/slot_allocator.py",
    r"protocol\.py": "messages.py, wire.py, edges.py or addresses.py in pipeinfer/core",
    r"[Cc]hronicles?": "history",
    r"[Ww]itness(?:es)?": "checker",
    r"[Ll]aws?": "invariant",
    r"[Ee]ntrants?": "contender",
    r"[Mm]uster": "Rendezvous",
    r"[Pp]ulses?": "load",
    r"last_words": "drain_stderr",
    r"[Jj]udged": "verified",
    r"[Tt]ally": "RequestStats",
    r"News|news": "RequestOutput, output",
    r"Withdrawn": "Aborted",
    r"is_deaf": "defers_results",
    r"[Ss]ights?": "visible slots",
    r"Cast|CAST": "JobSpec",
    r"admit(?:s|ted)?": "allocate",
    r"[Ff]rontier": "the schedule pipeinfer, or unsent nodes",
    r"(?:Op|Kind)\.CLEAR": "FREE or TRUNCATE",
    r"[Ss]eats?": "place",
    r"[Ss]cenes?": "scenario",
}
TABLE = "the cells of a printed table"
# File -> line without its indentation -> why it stays.
ALLOWED = {
    "docs/ARCHITECTURE.md": {
        "| slot (KV slot) | the place of one token's keys and values in a shard | vLLM: slot; llama.cpp: cell |": (
            "names another project's word"
        ),
    },
    "pipeinfer/bench/rows.py": {
        'cells = [f"{_cell(place.get(axis)):>{_width(axis)}}" for axis in axes]': TABLE,
        """return "  " + " ".join([*cells, f"{row['policy']:<20}"]) + numbers""": TABLE,
        "def _cell(value: Any) -> str:": TABLE,
    },
}


def pattern(word: str) -> re.Pattern[str]:
    """Finds ``word`` as a whole word, and as a part of a name that underscores or capitals set off."""
    return re.compile(rf"(?<![A-Za-z0-9])(?:{word})(?![a-z0-9])")


def found(written: str, word: str) -> Iterator[tuple[int, str]]:
    """The lines of ``written`` with the old ``word``, and their numbers."""
    old = pattern(word)
    for number, line in enumerate(written.splitlines(), 1):
        if old.search(line):
            yield number, line.strip()


def searched() -> list[str]:
    return [
        name
        for name in checkout()
        if name.endswith(WRITTEN) and not name.startswith(NOT_SEARCHED) and not any(part in name for part in DATA)
    ]


@pytest.mark.parametrize("word", OLD)
def test_no_old_word_is_left(word: str) -> None:
    left = [
        f"{name}:{number}: {line}"
        for name in searched()
        for number, line in found(text(name), word)
        if line not in ALLOWED.get(name, {})
    ]
    assert not left, f"today's name is {OLD[word]}:\n" + "\n".join(left)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (r"[Cc]ells?", "x = free_cells(3)"),
        (r"[Cc]ells?", "| a cell | of a shard |"),
        (r"CellTable|CELLTABLE", "table = CellTable(8)"),
        (r"[Jj]udged", "def test_it_is_judged(): ..."),
        (r"[Ll]aws?", "laws = {}"),
        (r"Cast|CAST", "cast: Cast"),
        (r"[Ff]rontier", "heapq.heappush(self._frontier, node)"),
        (r"[Tt]ally", "_Tally()"),
    ],
)
def test_a_planted_word_is_found(word: str, line: str) -> None:
    assert word in OLD
    assert list(found(f"first\n    {line}\nlast\n", word)) == [(2, line)]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (r"[Cc]ells?", "an excellent cellar"),
        (r"[Ll]aws?", "a flaw, a lawn"),
        (r"Cast|CAST", "data = memoryview(buf).cast('B')"),
        (r"[Ss]ights?", "insight"),
        (r"[Pp]ulses?", "an impulse"),
    ],
)
def test_other_words_are_not(word: str, line: str) -> None:
    assert not list(found(line, word))
