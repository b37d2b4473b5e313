"""The documents' tables are what the committed results say."""

from __future__ import annotations

import re

import pytest

from benchmarks.document import BLOCK, DOCUMENTS, refreshed
from benchmarks.views import show
from pipeinfer.costs.paths import BENCHMARKS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_say_what_was_measured(path) -> None:  # type: ignore[no-untyped-def]
    text = path.read_text(encoding="utf-8")
    assert refreshed(text) == text, "python -m benchmarks.document"
    for block in BLOCK.finditer(text):
        table = [line for line in block[0].splitlines() if line.startswith("|")]
        assert len(table) > 2, block[1]
        assert len({line.count("|") for line in table}) == 1
        assert re.search(r"\*\*(REAL|EMULATED|SIMULATED)\*\*", block[0])


def test_every_committed_result_is_shown() -> None:
    shown = {found[2] for path in DOCUMENTS for found in BLOCK.finditer(path.read_text(encoding="utf-8"))}
    assert shown == {file.stem for file in (BENCHMARKS / "results").glob("*.jsonl")}


def test_a_wrong_figure_is_noticed() -> None:
    text = DOCUMENTS[1].read_text(encoding="utf-8")
    block = next(BLOCK.finditer(text))
    figure = re.findall(r"\| (\d+\.\d\d) \|", block[0])[0]
    wrong = text.replace(block[0], block[0].replace(figure, "99.99"))
    assert wrong != text
    assert refreshed(wrong) == text


def test_slots() -> None:
    assert [show(value) for value in (None, 0.12345, 7, ["window=1"], "")] == ["", "0.123", "7", "window=1", ""]
