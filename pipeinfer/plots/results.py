"""Result files for plots: checked rows, and the axes in which they differ."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeinfer.core.errors import refuse

Row = dict[str, Any]
"""One line of a result file: one policy at one point."""
MOST_PANELS, MOST_COLUMNS = 24, 4
FACETS: dict[str, tuple[Callable[[Row], Any], str]] = {
    "execution": (lambda row: row["execution"].upper(), "{}"),
    "suite": (lambda row: row.get("suite"), "{}"),
    "target": (lambda row: row.get("target"), "target {}"),
    "draft": (lambda row: row.get("draft"), "draft {}"),
    "hardware": (lambda row: row.get("hardware"), "{}"),
    "ranks": (lambda row: row["ranks"], "{} ranks"),
    "acceptance": (lambda row: top1(row), "first choice right {}"),
    "draft time": (lambda row: row.get("draft_time"), "draft pass {} stage times"),
    "prompt": (lambda row: row.get("prompt_tokens"), "{} prompt tokens"),
    "tokens": (lambda row: row.get("tokens"), "{} new tokens"),
    "dtype": (lambda row: row.get("dtype"), "{}"),
    "knobs": (lambda row: ", ".join(row.get("set") or ()) or None, "{}"),
}
"""What may differ between points, and how it is said, in the order in which panels are named and sorted."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Rows that differ in their policy and in what the picture's axis shows; ``title`` says in what others differ."""

    title: str
    rows: list[Row]


def read_results(paths: Sequence[Path]) -> list[Row]:
    """The rows of result files. Raises UserError for other files."""
    rows: list[Row] = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            refuse(f"the results {path} cannot be read ({why})", "name a file that `pipeinfer bench` wrote")
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_row(line, f"{path}, line {number}"))
    if not rows:
        refuse(f"{', '.join(map(str, paths))}: no rows", "name a file that `pipeinfer bench` wrote")
    return rows


def _row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
        row["tokens_per_s"]["median"] + row["tokens_per_s"]["p10"] + row["tokens_per_s"]["p90"] + row["ranks"]
        if not isinstance(row["policy"], str) or not isinstance(row["execution"], str):
            raise TypeError("policy and execution are words")
    except (ValueError, TypeError, LookupError) as error:
        refuse(f"{where} is no result ({type(error).__name__}: {error})", "name a file that `pipeinfer bench` wrote")
    return dict(row)


def top1(row: Row) -> float | None:
    """How often the draft's first choice is right, where that was forced."""
    return (row.get("acceptance") or {}).get("top1")


def kind_of(rows: Sequence[Row]) -> str:
    """The kind of picture that shows what differs in ``rows``."""
    if len({top1(row) for row in rows} - {None}) > 1:
        return "speed"
    return "depth" if len({row["ranks"] for row in rows}) > 1 else "ablation"


def policies(rows: Sequence[Row]) -> list[str]:
    """Their policies, in the order of appearance."""
    return list(dict.fromkeys(row["policy"] for row in rows))


def panels(rows: Sequence[Row], axis: str = "") -> tuple[list[Panel], int]:
    """``rows`` by everything that differs but the policy and ``axis``, and how many panels make a line of the picture.

    Raises UserError for more than can be drawn."""
    varying = [name for name, (of, _) in FACETS.items() if name != axis and len({of(row) for row in rows}) > 1]
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(FACETS[name][0](row) for name in varying), []).append(row)
    if len(found) > MOST_PANELS:
        refuse(f"{len(found)} panels, for {', '.join(varying)} differ", "give a file with fewer rows")
    places = sorted(found, key=lambda values: [_rank(value) for value in values])
    columns = len(found) if len(found) <= MOST_COLUMNS else len({values[-1] for values in found})
    return [Panel(_title(varying, values), found[values]) for values in places], min(columns, MOST_COLUMNS)


def _rank(value: Any) -> tuple[float, str]:
    """Numbers by their size, words by the alphabet, nothing first."""
    return (value, "") if isinstance(value, int | float) else (-math.inf, value or "")


def _title(names: Sequence[str], values: Sequence[Any]) -> str:
    told = [(FACETS[name][1], value) for name, value in zip(names, values, strict=True) if value is not None]
    return ", ".join(form.format(value) for form, value in told)
