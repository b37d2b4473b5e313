"""The PipeInfer study (SC'24) beside ours: speeds over synchronous speculation, as published and as they came out here.

Its figures are those of its abstract and of texts that cite it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from benchmarks.views import TITLES, Row, axes, by_point, place, show, speed, table
from pipeinfer.core.metrics import percentile

Points = Sequence[dict[str, Row]]


def latencies(rows: Sequence[Row]) -> str:
    """A line for each point: speeds over the better synchronous policy, TTFT and ITL (p50, p99) in milliseconds."""
    varying = axes(rows)
    heads = ["pipeinfer over sync", "continuous over sync", "continuous over plain", "TTFT plain", "sync", "continuous"]
    heads += ["ITL plain", "sync", "continuous"]
    lines = [[TITLES.get(axis, axis) for axis in varying] + heads]
    for found in by_point(rows):
        three = [found["plain"], better_sync(found), found["continuous"]]
        line = [show(place(found["plain"])[axis]) for axis in varying]
        line += [f"{over_sync(found, name):.2f}" for name in ("pipeinfer", "continuous")]
        line.append(f"{found['continuous']['ratio_to_plain']:.2f}")
        line += [f"{row['ttft_ms']:.0f}" for row in three]
        lines.append(line + [f"{row['itl_ms']['p50']:.0f}, {row['itl_ms']['p99']:.0f}" for row in three])
    return table(lines)


def claims(rows: Sequence[Row]) -> str:
    """What was published, beside PipeInfer's schedule and continuous speculation on our engine."""
    points = by_point(rows)
    usual = Counter(top1(found) for found in points).most_common(1)[0][0]
    pairs = [found for found in points if top1(found) == usual]
    hardware = sorted({found["plain"]["hardware"] for found in pairs})
    others = sorted({top1(found) for found in points} - {usual})
    published = {
        "dual-xeon-e5-1gbe": "more than on InfiniBand",
        others[0]: "up to 2.15 (poorly aligned pairs)",
        others[-1]: "up to 1.7 (well aligned pairs)",
    }

    def line(name: str, said: str, some: Points) -> list[str]:
        return [name, said, spread("pipeinfer", some), spread("continuous", some)]

    lines = [["over synchronous speculation", "published", "its schedule here", "continuous"]]
    lines.append(line(f"all pairs and nodes, top-1 {usual}", "1.5 to 2.15", pairs))
    for name in hardware:
        some = [found for found in pairs if found["plain"]["hardware"] == name]
        lines.append(line(name, published.get(name, ""), some))
    for value in others:
        some = [found for found in points if top1(found) == value]
        lines.append(line(f"top-1 {value}, 8 nodes", published.get(value, ""), some))
    least = [min(found[name]["ratio_to_plain"] for found in points) for name in ("pipeinfer", "continuous")]
    lines.append(["least, in times plain", "near-zero loss", *(f"{ratio:.2f}" for ratio in least)])
    return table(lines)


def top1(found: dict[str, Row]) -> float:
    """How often the draft's first choice is right at a point."""
    value: float = place(found["plain"])["top1"]
    return value


def better_sync(found: dict[str, Row]) -> Row:
    """The quicker of a point's synchronous policies."""
    return max((found["sync-chain"], found["sync-tree"]), key=speed)


def over_sync(found: dict[str, Row], name: str) -> float:
    """The speed of a point's policy ``name``, over the better synchronous one's."""
    return speed(found[name]) / speed(better_sync(found))


def spread(name: str, points: Points) -> str:
    """The speeds of a policy over the better synchronous one, as text."""
    speeds = sorted(over_sync(found, name) for found in points)
    return f"{speeds[0]:.2f} to {speeds[-1]:.2f}, median {percentile(speeds, 0.5):.2f}"
