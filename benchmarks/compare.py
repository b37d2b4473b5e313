"""Are two measurements different? Row by row: the ratio of the medians with its 95 % confidence interval (bootstrap),
and the Mann-Whitney test of the samples, corrected for the number of rows (Benjamini and Hochberg). Needs scipy.

    python -m benchmarks.compare OLD.jsonl NEW.jsonl
    python -m benchmarks.compare --checkouts OLD NEW --rounds 6 throughput --emulate --repeats 1

The second form measures a suite in two checkouts in turn, each in its own environment, so that a disturbance meets
both. The exit code is 1 where a row is slower.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

SURE = 0.05
PLACE = (
    "suite", "execution", "policy", "ranks", "acceptance", "draft_time", "hardware", "target", "draft", "dtype",
    "prompt_tokens", "tokens", "set", "claims", "burst", "tp", "fused", "efficiency",
)  # fmt: skip
"""What makes two rows comparable."""

Samples = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """``ratio`` of new to old and its interval; ``p``: how likely samples that differ so much are without a reason."""

    old: float
    new: float
    ratio: float
    low: float
    high: float
    p: float

    @property
    def label(self) -> str:
        """What may be said."""
        if self.p >= SURE or self.low <= 1 <= self.high:
            return "no difference shown"
        return "faster" if self.ratio > 1 else "slower"


def read(path: Path) -> Samples:
    """The samples in a result file, by what was measured."""
    samples: Samples = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        place = json.dumps({key: row.get(key) for key in PLACE})
        samples.setdefault(place, []).extend(row["samples"])
    return samples


def compare(old: Samples, new: Samples) -> dict[str, Verdict]:
    """A verdict on every place that both have."""
    places = [place for place in old if place in new]
    found = [_figures(np.array(old[place]), np.array(new[place])) for place in places]
    sure = stats.false_discovery_control([p for *_, p in found]) if found else []
    return {place: Verdict(*figures[:-1], p) for place, figures, p in zip(places, found, sure, strict=True)}


def _figures(old: np.ndarray, new: np.ndarray) -> tuple[float, ...]:
    def ratio(one: np.ndarray, other: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.median(other, axis=axis) / np.median(one, axis=axis)

    p = stats.mannwhitneyu(old, new).pvalue
    low = high = float(ratio(old, new))
    if min(len(old), len(new)) > 1:
        interval = stats.bootstrap((old, new), ratio, method="percentile", rng=np.random.default_rng(0))
        low, high = map(float, interval.confidence_interval)
    return float(np.median(old)), float(np.median(new)), float(ratio(old, new)), low, high, float(p)


def alternate(checkouts: Sequence[str], rounds: int, arguments: Sequence[str]) -> list[Samples]:
    """Measure in each checkout in turn, ``rounds`` times."""
    found: list[Samples] = [{}, {}]
    with tempfile.TemporaryDirectory() as place:
        for turn in range(rounds):
            order = list(enumerate(checkouts))
            for index, checkout in order if turn % 2 == 0 else order[::-1]:
                out = Path(place) / f"{turn}.{index}"
                program = Path(checkout) / ".venv" / "bin" / "pipeinfer"
                line = [str(program), "bench", *arguments, "--out", str(out)]
                subprocess.run(line, cwd=checkout, stdout=sys.stderr, check=True)
                for file in out.glob("*.jsonl"):
                    for key, samples in read(file).items():
                        found[index].setdefault(key, []).extend(samples)
    return found


def _words(place: dict[str, Any]) -> list[Any]:
    """What a line says of its place."""
    acceptance = place.pop("acceptance") or {}
    return [*place.values(), acceptance and f"top-1 {acceptance['top1']:g}"]


def main() -> int:
    """Print a line for each row that both have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", nargs=2, metavar=("OLD", "NEW"), help="directories that `make venv` was run in")
    parser.add_argument("--rounds", type=int, default=6, help="with --checkouts: of both (default 6)")
    args, rest = parser.parse_known_args()
    if args.checkouts:
        old, new = alternate(args.checkouts, args.rounds, rest)
    elif len(rest) == 2:
        old, new = (read(Path(name)) for name in rest)
    else:
        parser.error("name two result files, or --checkouts and what to measure")
    verdicts = compare(old, new)
    if not verdicts:
        parser.error("the two have no row in common")
    print(f"# {'old':>9} {'new':>9} {'ratio':>6} {'95 % interval':>15} {'p':>6}  verdict")
    for place, verdict in verdicts.items():
        interval = f"{verdict.low:.3f}-{verdict.high:.3f}"
        where = " ".join(map(str, filter(None, _words(json.loads(place)))))
        figures = f"{verdict.old:>11.2f} {verdict.new:>9.2f} {verdict.ratio:>6.3f} {interval:>15} {verdict.p:>6.3f}"
        print(f"{figures}  {verdict.label}: {where}")
    return any(verdict.label == "slower" for verdict in verdicts.values())


if __name__ == "__main__":
    sys.exit(main())
