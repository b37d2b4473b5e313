"""Puts the committed runs of benchmarks/results into README.md and docs/benchmarks.md.

    python -m benchmarks.document            writes the blocks anew
    python -m benchmarks.document --check    says whether they are up to date; exit code 1 if not

A block stands between ``<!-- result FILE VIEW [AXIS=VALUE ...] -->`` and ``<!-- end -->``: FILE is a result without its
``.jsonl``, VIEW a function of benchmarks.views or benchmarks.study by name.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from benchmarks.quality import formats
from benchmarks.study import claims, latencies
from benchmarks.views import Row, agreement, costs, first_tokens, guesses, place, policies, ratios, read, show, tails
from pipeinfer.bench.rows import BANNERS
from pipeinfer.costs.paths import BENCHMARKS

ROOT = BENCHMARKS.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
SHOWN = (ratios, policies, guesses, agreement, claims, latencies, costs, formats, first_tokens, tails)
VIEWS = {view.__name__: view for view in SHOWN}
BLOCK = re.compile(r"(<!-- result (\S+) (\w+)((?: \w+=\S+)*) -->\n).*?(<!-- end -->)", re.DOTALL)


def block(name: str, view: str, wanted: str) -> str:
    """What stands between the marks: where it was measured, and a table of the rows ``wanted``."""
    rows = read(name)
    for axis, _, value in (word.partition("=") for word in wanted.split()):
        rows = [row for row in rows if show(place(row)[axis]) == value]
    return f"{origin(rows)}\n\n{VIEWS[view](rows)}\n"


def origin(rows: Sequence[Row]) -> str:
    """Where and how ``rows`` were measured."""
    first = rows[0]
    machine = first["fingerprint"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['when'][:10]}, commit {machine['git']}"
    if first["suite"] == "profile":
        return f"**REAL** (`python -m benchmarks.profile`; {where}; processor time of one thread)"
    if first["suite"] == "quality":
        return f"**REAL** (`python -m benchmarks.quality`; {where}; {first['tokens']} held-out tokens)"
    banner = BANNERS[first["execution"]].partition(":")[0]
    samples = sorted({row["tokens_per_s"]["n"] for row in rows if row["policy"] != "plain"})
    flag = {"emulated": " --emulate", "simulated": " --simulate", "real": " --real"}[first["execution"]]
    many = " or ".join(map(str, samples))
    return f"**{banner}** (`pipeinfer bench {first['suite']}{flag}`; {where}; medians of {many} samples)"


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
