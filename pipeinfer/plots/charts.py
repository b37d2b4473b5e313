"""Results as pictures: speed against acceptance or ranks, gaps between emissions, bars of one point's policies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeinfer.core.errors import refuse
from pipeinfer.plots.results import Panel, Row, panels, policies, top1
from pipeinfer.plots.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, SKY, VERMILLION, new_figure, tidy

KNOWN = {
    "plain": GREY,
    "continuous": BLUE,
    "sync-chain": ORANGE,
    "sync-tree": GREEN,
    "pipeinfer": VERMILLION,
}
"""Policies with fixed colours; other policies take the remaining colours in turn."""
OTHERS = (PURPLE, SKY, INK, VERMILLION, GREEN, ORANGE)
MARKERS = "osD^vPX*"
PANEL_INCHES = (3.6, 2.9)
BAR_INCHES = 0.28


def draw_speed(rows: Sequence[Row]) -> Figure:
    """Speed against how often the draft's first choice is right; a panel for each depth."""
    rows = [row for row in rows if top1(row) is not None]
    if not rows:
        refuse("no row has a forced acceptance", "draw these results with --kind depth, itl or ablation")
    return _curves(rows, "acceptance", top1, "the draft's first choice is right")


def draw_depth(rows: Sequence[Row]) -> Figure:
    """Speed against the number of ranks."""
    return _curves(rows, "ranks", lambda row: row["ranks"], "ranks")


def _curves(rows: Sequence[Row], axis: str, x_of: Callable[[Row], Any], x_name: str) -> Figure:
    names = policies(rows)
    is_ratio = all(row.get("ratio_to_plain") for row in rows)
    figure, grid, found = _grid(rows, axis)
    for axes, panel in zip(grid, found, strict=True):
        for name in names:
            mine = {x_of(row): row for row in panel.rows if row["policy"] == name}  # of equal points the last
            places = sorted(mine)
            middle = [_height(mine[x], "median", is_ratio) for x in places]
            low = [y - _height(mine[x], "p10", is_ratio) for x, y in zip(places, middle, strict=True)]
            high = [_height(mine[x], "p90", is_ratio) - y for x, y in zip(places, middle, strict=True)]
            color, marker = _look(name, names)
            whiskers: dict[str, Any] = {"yerr": (_positive(low), _positive(high)), "elinewidth": 0.8, "capsize": 0}
            axes.errorbar(places, middle, **whiskers, color=color, marker=marker, ms=4, lw=1.4, label=name)
        ideal = {x_of(row): _ideal(row, is_ratio) for row in panel.rows if row.get("ideal_tokens_per_s")}
        if ideal:
            places = sorted(ideal)
            axes.plot(places, [ideal[x] for x in places], color=INK, ls="--", lw=1.2, label="ideal")
        axes.set_xticks(sorted({x_of(row) for row in rows}))
        axes.set_xlabel(x_name, size=9)
        axes.grid(axis="y", color=PALE, lw=0.6)
    for axes in grid:
        axes.set_ylim(bottom=0)
        if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel("times plain" if is_ratio else "tokens/s", size=9)
    _add_legend(figure, grid)
    return figure


def draw_gaps(rows: Sequence[Row]) -> Figure:
    """Gaps between emissions (ITL): for each policy the median, the 90th and the 99th percentile."""
    rows = [row for row in rows if row.get("itl_ms")]
    if not rows:
        refuse("no row says what its ITL was", "draw these results with another --kind")
    names = policies(rows)
    figure, grid, found = _grid(rows, lines=len(names))
    for axes, panel in zip(grid, found, strict=True):
        mine = {row["policy"]: row["itl_ms"] for row in panel.rows}
        for place, name in enumerate(names):
            if name in mine:
                color = _look(name, names)[0]
                p50, p90, p99 = (mine[name][share] for share in ("p50", "p90", "p99"))
                axes.plot([p50, p99], [place, place], color=color, lw=1.6, solid_capstyle="butt")
                axes.plot([p50], [place], marker="o", ms=6, color=color)
                axes.plot([p90], [place], marker="|", ms=9, mew=1.8, color=color)
                axes.plot([p99], [place], marker="o", ms=6, mfc="white", color=color)
        _list_policies(axes, names)
        axes.set_xlim(left=0)
        axes.set_xlabel("ms between emissions: ● p50   | p90   ○ p99", size=9)
    return figure


def draw_bars(rows: Sequence[Row]) -> Figure:
    """A bar for each policy, with whiskers from p10 to p90."""
    names = policies(rows)
    is_ratio = all(row.get("ratio_to_plain") for row in rows)
    figure, grid, found = _grid(rows, lines=len(names))
    for axes, panel in zip(grid, found, strict=True):
        mine = {row["policy"]: row for row in panel.rows}
        widest = max(_height(row, "p90", is_ratio) for row in mine.values())
        for place, name in enumerate(names):
            if name in mine:
                length, low, high = (_height(mine[name], what, is_ratio) for what in ("median", "p10", "p90"))
                axes.barh(place, length, height=0.7, color=_look(name, names)[0])
                axes.errorbar(length, place, xerr=([max(0, length - low)], [max(0, high - length)]), color=INK, lw=1)
                told = f"{length:.2f}" if length < 100 else f"{length:.0f}"
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axes.text(max(length, high) + 0.015 * widest, place, told, va="center", size=8, color=INK, bbox=box)
        ideal = [_ideal(row, is_ratio) for row in panel.rows if row.get("ideal_tokens_per_s")]
        if ideal:
            axes.axvline(ideal[-1], color=INK, ls="--", lw=1.2, label="ideal")
        _list_policies(axes, names)
        axes.set_xlim(0, 1.12 * max([widest, *ideal]))
        axes.set_xlabel("times plain" if is_ratio else "tokens/s", size=9)
    _add_legend(figure, grid)
    return figure


def _grid(rows: Sequence[Row], axis: str = "", lines: int = 0) -> tuple[Figure, list[Axes], list[Panel]]:
    """A titled figure with axes for each panel, and the panels: of ``lines`` policies below each other, or curves."""
    found, columns = panels(rows, axis)
    deep = math.ceil(len(found) / columns)
    width, height = PANEL_INCHES
    if lines:
        width, height = width + 1.2, 0.9 + BAR_INCHES * lines
    executions = dict.fromkeys(row["execution"] for row in rows)
    figure = new_figure(max(6.0, width * columns), height * deep, " + ".join(executions), _about(rows))
    grid = list(figure.subplots(deep, columns, squeeze=False, sharey="row").flat)
    for axes in grid[len(found) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid, found, strict=False):
        tidy(axes)
        axes.set_title(panel.title, size=9, loc="left")
    return figure, grid[: len(found)], found


def _about(rows: Sequence[Row]) -> list[str]:
    prints: list[dict[str, Any]] = [row.get("fingerprint") or {} for row in rows]
    suites = sorted({row["suite"] for row in rows if row.get("suite")})
    hosts = sorted({str(one["host"]) for one in prints if one.get("host")})
    days = sorted({str(one["when"])[:10] for one in prints if one.get("when")})
    return [", ".join(suites), ", ".join(hosts), " to ".join(dict.fromkeys([*days[:1], *days[-1:]]))]


def _look(name: str, names: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of a policy among ``names``."""
    strangers = [other for other in names if other not in KNOWN]
    color = KNOWN[name] if name in KNOWN else OTHERS[strangers.index(name) % len(OTHERS)]
    return color, MARKERS[names.index(name) % len(MARKERS)]


def _height(row: Row, what: str, is_ratio: bool) -> float:
    """A percentile of the speed of ``row``, in times plain or in tokens/s."""
    speed = row["tokens_per_s"]
    scale = row["ratio_to_plain"] / speed["median"] if is_ratio else 1.0
    return float(scale * speed[what])


def _ideal(row: Row, is_ratio: bool) -> float:
    scale = row["ratio_to_plain"] / row["tokens_per_s"]["median"] if is_ratio else 1.0
    return float(scale * row["ideal_tokens_per_s"])


def _positive(lengths: Sequence[float]) -> list[float]:
    return [max(0.0, length) for length in lengths]


def _list_policies(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, size=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=PALE, lw=0.6)


def _add_legend(figure: Figure, grid: Sequence[Axes]) -> None:
    """Below all panels, each name once."""
    entries = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if "ideal" in entries:  # matplotlib puts lines before those with whiskers
        entries["ideal"] = entries.pop("ideal")
    if entries:
        look = {"fontsize": 8, "frameon": False, "ncols": max(1, int(figure.get_figwidth() / 1.3))}
        figure.legend(entries.values(), entries.keys(), loc="outside lower left", **look)
