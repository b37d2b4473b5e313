"""What a block of a document can show of a result: each view makes a table in Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pipeinfer.bench.rows import AXES, of_ideal
from pipeinfer.core.metrics import percentile
from pipeinfer.costs.paths import BENCHMARKS

TITLES = {"top1": "top-1", "draft_time": "draft pass", "prompt_tokens": "prompt", "tokens": "new tokens"}

Row = dict[str, Any]


def read(name: str) -> list[Row]:
    """The rows of benchmarks/results/``name``.jsonl."""
    path = BENCHMARKS / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def axes(rows: Sequence[Row]) -> list[str]:
    """What differs among ``rows`` besides the policy."""
    places = [place(row) for row in rows]
    varying = [axis for axis in AXES if axis != "stages" and len({str(one[axis]) for one in places}) > 1]
    return varying or ["ranks"]


def place(row: Row) -> Row:
    """Where ``row`` stands on each axis."""
    return {axis: row.get(axis) for axis in AXES} | {"top1": (row["acceptance"] or {}).get("top1")}


def ratios(rows: Sequence[Row]) -> str:
    """A line for each point: plain's speed, and all others in times of it."""
    varying = axes(rows)
    names = list(dict.fromkeys(row["policy"] for row in rows))
    has_ideal = any(row["ideal_tokens_per_s"] for row in rows)
    rivals = [name for name in names if name not in ("plain", "continuous")]
    extra = (["ideal", "of ideal"] if has_ideal else []) + (["over best rival"] if rivals else [])
    others = [name for name in names if name != "plain"]
    lines = [[TITLES.get(axis, axis) for axis in varying] + ["plain, tokens/s", *others, *extra]]
    for found in by_point(rows):
        plain, ours = speed(found["plain"]), speed(found["continuous"])
        line = [show(place(found["plain"])[axis]) for axis in varying] + [f"{plain:.2f}"]
        line += [f"{speed(found[name]) / plain:.2f}" for name in others]
        if has_ideal:
            ideal, share = found["plain"]["ideal_tokens_per_s"], of_ideal(found["continuous"])
            line += ["" if share is None else f"{ideal / plain:.2f}", "" if share is None else f"{share:.3f}"]
        if rivals:
            line.append(f"{ours / max(speed(found[name]) for name in rivals):.2f}")
        lines.append(line)
    return table(lines)


def tails(rows: Sequence[Row]) -> str:
    """A line for each point: what 99 % of requests do not exceed, in ms of plain and in times of it: TPOT, TTFT."""
    varying, names = axes(rows), list(dict.fromkeys(row["policy"] for row in rows))
    others = [name for name in names if name != "plain"]
    figures = {"TPOT": "request_tpot_p99_ms", "TTFT": "ttft_p99_ms"}
    heads = [f"{figure}: {name}" for figure in figures for name in ("plain, ms", *others)]
    lines = [[TITLES.get(axis, axis) for axis in varying] + heads]
    for found in by_point(rows):
        line = [show(place(found["plain"])[axis]) for axis in varying]
        for key in figures.values():
            line.append(f"{found['plain'][key]:.0f}")
            line += [f"{found[name][key] / found['plain'][key]:.2f}" for name in others]
        lines.append(line)
    return table(lines)


def first_tokens(rows: Sequence[Row]) -> str:
    """A line for each point: milliseconds to the first token by each policy, and how many times as soon ours is."""
    varying, names = axes(rows), list(dict.fromkeys(row["policy"] for row in rows))
    others = [name for name in names if name != "continuous"]
    heads = [*(f"{name}, ms" for name in names), *(f"{name} / continuous" for name in others)]
    lines = [[TITLES.get(axis, axis) for axis in varying] + heads]
    for found in by_point(rows):
        took = {name: found[name]["ttft_ms"] for name in names}
        line = [show(place(found["continuous"])[axis]) for axis in varying]
        line += [f"{took[name]:.0f}" for name in names]
        lines.append(line + [f"{took[name] / took['continuous']:.2f}" for name in others])
    return table(lines)


def by_point(rows: Sequence[Row]) -> list[dict[str, Row]]:
    """The rows of each point, by policy."""
    points: dict[str, dict[str, Row]] = {}
    for row in rows:
        where = [value for axis, value in place(row).items() if axis != "stages"]  # plain has one more
        points.setdefault(str(where), {})[row["policy"]] = row
    return list(points.values())


def speed(row: Row) -> float:
    """The usual tokens per second."""
    median: float = row["tokens_per_s"]["median"]
    return median


def agreement(rows: Sequence[Row]) -> str:
    """A line for each point: emulated speeds, in simulated ones of the same text; the median of all texts."""
    varying = axes(rows)
    simulated = {(row["policy"], str(place(row))): row for row in read(f"{rows[0]['suite']}.simulated")}
    names = list(dict.fromkeys(row["policy"] for row in rows))
    lines: dict[str, list[str]] = {}
    for row in rows:
        where = [show(place(row)[axis]) for axis in varying]
        twin = simulated[row["policy"], str(place(row))]
        shares = [one / other for one, other in zip(row["samples"], twin["samples"], strict=True)]
        lines.setdefault(str(where), where).append(f"{percentile(shares, 0.5):.3f}")
    return table([[TITLES.get(axis, axis) for axis in varying] + names, *lines.values()])


def policies(rows: Sequence[Row]) -> str:
    """A line for each policy at each point, with what it did."""
    varying = axes(rows)
    columns = ("ttft_ms", "acceptance_rate", "tokens_per_correction", "waste", "bubble", "cancel_latency_ms")
    heads = ["policy", "tokens/s", "p10 to p90", "times plain", *columns]
    lines = [[TITLES.get(axis, axis) for axis in varying] + heads]
    for row in rows:
        found = row["tokens_per_s"]
        ratio = "" if row["ratio_to_plain"] is None else f"{row['ratio_to_plain']:.2f}"
        line = [show(place(row)[axis]) for axis in varying]
        line += [row["policy"], f"{found['median']:.1f}", f"{found['p10']:.1f} to {found['p90']:.1f}", ratio]
        lines.append(line + [show(row[column]) for column in columns])
    return table(lines)


def guesses(rows: Sequence[Row]) -> str:
    """A line for each policy that speculates: what became of its guesses, and what their probabilities were worth."""
    columns = ("acceptance_rate", "tokens_per_correction", "waste", "cancel_latency_ms")
    lines = [["policy", "times plain", *columns, "calibration error as claimed", "as believed"]]
    for row in rows:
        error = row["calibration_error"]
        if row["policy"] != "plain":
            line = [row["policy"], f"{row['ratio_to_plain']:.2f}", *(show(row[column]) for column in columns)]
            lines.append([*line, show(error["claimed"]), show(error["believed"])])
    return table(lines)


def costs(rows: Sequence[Row]) -> str:
    """A line for each part of this project's own Python: microseconds, and what it may take."""
    columns = ("n", "median_us", "mean_us", "p99_us")
    lines = [["what", "n", "median", "mean", "p99", "allowed", ""]]
    for row in rows:
        verdict = "" if row["budget_us"] is None else "kept" if row["ok"] else "EXCEEDED"
        lines.append([row["what"], *(show(row[column]) for column in columns), show(row["budget_us"]), verdict])
    return table(lines)


def show(value: Any) -> str:
    """A slot."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown; the first line is the head."""
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|--" * len(lines[0]) + "|", *body])
