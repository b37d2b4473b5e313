"""What chains of guesses could gain: E(k) T(1) / (k d + T(k + 1)), the best over k."""

from __future__ import annotations

import pytest

from pipeinfer.bench.pair_passes import LONGEST, ROWS, best_gain, lines, time_passes


def test_the_formula() -> None:
    passes = {rows: 50.0 + 5.0 * rows for rows in range(1, LONGEST + 2)}

    def gain(length: int) -> float:
        tokens = (1 - 0.75 ** (length + 1)) / (1 - 0.75)
        return tokens * passes[1] / (length * 6.0 + passes[length + 1])

    best = max(range(1, LONGEST + 1), key=gain)
    assert 1 < best < LONGEST
    assert best_gain(passes, 6.0, 0.75) == (best, pytest.approx(gain(best)))


@pytest.mark.parametrize(
    ("slope", "draft", "agreement", "length", "gain"),
    [
        (0.0, 0.0, 1.0, LONGEST, LONGEST + 1.0),  # rows and drafts cost nothing, and guesses are right
        (0.0, 0.0, 0.0, 1, 1.0),  # guesses are never right
        (100.0, 0.0, 1.0, 1, 1.0),  # a row costs as much as a pass
        (0.0, 100.0, 0.5, 1, 0.75),  # the draft is as slow as the target
    ],
)
def test_cases_that_one_can_see(slope: float, draft: float, agreement: float, length: int, gain: float) -> None:
    passes = {rows: 100.0 + slope * (rows - 1) for rows in range(1, LONGEST + 2)}
    assert best_gain(passes, draft, agreement) == (length, pytest.approx(gain))


def test_passes_are_timed_in_turn_behind_the_same_text() -> None:
    asked: list[tuple[str, list[int], int, int]] = []

    def timed(name: str, tokens: list[int], first: int, wanted: int) -> float:
        asked.append((name, tokens, first, wanted))
        return len(tokens) * (1.0 if name == "a" else 2.0)

    text = list(range(20))
    models = {name: (lambda *call, name=name: timed(name, *call)) for name in "ab"}
    found = time_passes(models, text, (1, 4))  # type: ignore[arg-type]
    assert found == {"a": {1: 1000.0, 4: 4000.0}, "b": {1: 2000.0, 4: 8000.0}}
    assert asked[:2] == [("a", text, 0, 1), ("b", text, 0, 1)]
    assert asked[2:6] == [("a", [19], 19, 1), ("b", [19], 19, 1), ("a", text[16:], 16, 4), ("b", text[16:], 16, 4)]


def test_the_table_reads_what_was_a_json_object() -> None:
    passes = {str(rows): 10.0 * rows for rows in ROWS}
    table = list(lines({"pass_ms": {"ours": passes}, "agreement": 0.75, "best_length": 3, "gain": 1.5}))
    assert [len(line) for line in table[:2]] == [18 + 8 * len(ROWS)] * 2
    assert "0.750" in table[2] and "chains of 3, 1.50 times" in table[2]
