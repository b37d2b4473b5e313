"""Puts the committed runs of benchmarks/results into README.md and docs/benchmarks.md.

    python -m benchmarks.document            writes the blocks anew
    python -m benchmarks.document --check    says whether they are up to date; exit code 1 if not

A block stands between ``<!-- result FILE VIEW [AXIS=VALUE ...] -->`` and ``<!-- end -->``. FILE is a result without its
``.jsonl``, VIEW is ``ratios`` (a line for each point, times plain, all policies beside each other), ``policies`` (a
line for each policy) or ``agreement`` (of an emulated result: its speeds, in those of the simulated one).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pipeinfer.bench.places import BENCHMARKS
from pipeinfer.bench.rows import AXES, BANNERS

ROOT = BENCHMARKS.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
BLOCK = re.compile(r"(<!-- result (\S+) (\w+)((?: \w+=\S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)
TITLES = {"top1": "top-1", "draft_time": "draft pass", "prompt_tokens": "prompt", "tokens": "new tokens"}

Row = dict[str, Any]


def read(name: str) -> list[Row]:
    """The rows of benchmarks/results/``name``.jsonl."""
    path = BENCHMARKS / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def block(name: str, view: str, wanted: str) -> str:
    """What stands between the marks: where it was measured, and a table of the rows ``wanted``."""
    rows = read(name)
    for axis, _, value in (word.partition("=") for word in wanted.split()):
        rows = [row for row in rows if show(place(row)[axis]) == value]
    first = rows[0]
    machine, banner = first["fingerprint"], BANNERS[first["execution"]].partition(":")[0]
    samples = sorted({row["tokens_per_s"]["n"] for row in rows if row["policy"] != "plain"})
    flag = {"emulated": " --emulate", "simulated": " --simulate", "real": " --real"}[first["execution"]]
    said = (
        f"**{banner}** (`pipeinfer bench {first['suite']}{flag}`; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['when'][:10]}, commit {machine['git']}; medians of {' or '.join(map(str, samples))} samples)"
    )
    return f"{said}\n\n{VIEWS[view](rows)}\n"


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
    points: dict[str, dict[str, Row]] = {}
    for row in rows:
        points.setdefault(str([place(row)[axis] for axis in varying]), {})[row["policy"]] = row
    has_ideal = all(row["ideal_tokens_per_s"] for row in rows)
    rivals = [name for name in names if name not in ("plain", "continuous")]
    extra = (["ideal", "of ideal"] if has_ideal else []) + (["over best rival"] if rivals else [])
    others = [name for name in names if name != "plain"]
    lines = [[TITLES.get(axis, axis) for axis in varying] + ["plain, tokens/s", *others, *extra]]
    for found in points.values():
        plain, ours = (found[name]["tokens_per_s"]["median"] for name in ("plain", "continuous"))
        line = [show(place(found["plain"])[axis]) for axis in varying] + [f"{plain:.2f}"]
        line += [f"{found[name]['tokens_per_s']['median'] / plain:.2f}" for name in others]
        if has_ideal:
            ideal = found["plain"]["ideal_tokens_per_s"]
            line += [f"{ideal / plain:.2f}", f"{ours / ideal:.3f}"]
        if rivals:
            line.append(f"{ours / max(found[name]['tokens_per_s']['median'] for name in rivals):.2f}")
        lines.append(line)
    return table(lines)


def agreement(rows: Sequence[Row]) -> str:
    """A line for each point: emulated speeds, in simulated ones."""
    varying = axes(rows)
    simulated = {(row["policy"], str(place(row))): row for row in read(f"{rows[0]['suite']}.simulated")}
    names = list(dict.fromkeys(row["policy"] for row in rows))
    lines: dict[str, list[str]] = {}
    for row in rows:
        where = [show(place(row)[axis]) for axis in varying]
        twin = simulated[row["policy"], str(place(row))]
        ratio = row["tokens_per_s"]["median"] / twin["tokens_per_s"]["median"]
        lines.setdefault(str(where), where).append(f"{ratio:.3f}")
    return table([[TITLES.get(axis, axis) for axis in varying] + names, *lines.values()])


def policies(rows: Sequence[Row]) -> str:
    """A line for each policy at each point, with what it did."""
    varying = axes(rows)
    columns = ("ttft_ms", "acceptance_rate", "accept_length", "waste", "bubble", "cancel_latency_ms")
    heads = ["policy", "tokens/s", "p10 to p90", "times plain", *columns]
    lines = [[TITLES.get(axis, axis) for axis in varying] + heads]
    for row in rows:
        speed = row["tokens_per_s"]
        ratio = "" if row["ratio_to_plain"] is None else f"{row['ratio_to_plain']:.2f}"
        line = [show(place(row)[axis]) for axis in varying]
        line += [row["policy"], f"{speed['median']:.1f}", f"{speed['p10']:.1f} to {speed['p90']:.1f}", ratio]
        lines.append(line + [show(row[column]) for column in columns])
    return table(lines)


VIEWS: dict[str, Callable[[Sequence[Row]], str]] = {"ratios": ratios, "policies": policies, "agreement": agreement}


def show(value: Any) -> str:
    """A cell."""
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(lines: Sequence[Sequence[str]]) -> str:
    """Markdown; the first line is the head."""
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|--" * len(lines[0]) + "|", *body])


def refreshed(document: str) -> str:
    """``document`` with its blocks written anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{block(found[2], found[3], found[4])}{found[5]}", document)


def main() -> int:
    """Write the documents, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = 0
    for path in DOCUMENTS:
        before = path.read_text(encoding="utf-8")
        if (after := refreshed(before)) == before:
            continue
        stale = 1
        if args.check:
            name = path.relative_to(ROOT)
            print(f"{name} is not what the results say: python -m benchmarks.document", file=sys.stderr)
        else:
            path.write_text(after, encoding="utf-8")
    return stale if args.check else 0


if __name__ == "__main__":
    sys.exit(main())
