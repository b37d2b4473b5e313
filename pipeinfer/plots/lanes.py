"""The timeline of a job: a lane per role, passes coloured by their outcome, and messages between lanes.

Where passes have rows of several requests, and these are few, each request has a colour of its own: a pass is cut into
the shares of its requests, and the lower, dark part of a share are the rows that were accepted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pipeinfer.core.addresses import FIRST_DRAFTER, ORCHESTRATOR, address_name
from pipeinfer.core.errors import refuse
from pipeinfer.core.messages import Cancel, Result, Run
from pipeinfer.plots.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, SKY, VERMILLION, new_figure, tidy
from pipeinfer.runtime.timeline import Outcome, Span, Timeline, Word

FILLS = {
    Outcome.PREFILL: GREY,
    Outcome.ACCEPTED: BLUE,
    Outcome.PARTLY: SKY,
    Outcome.WASTED: ORANGE,
    Outcome.CANCELLED: VERMILLION,
    Outcome.DRAFT: PALE,
    Outcome.UNFINISHED: "white",
}
REQUEST_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
"""Of the requests of a job with no more than these, in the order of submission."""
TINT = 0.35
"""How much of its colour is left in rows of a request that were not accepted; the rest is white."""
WIDTH_INCHES, LANE_INCHES = 12.0, 0.5
HALF = 0.34
"""Half the height of a pass, as a share of the lane's height."""
LEAST_LETTERED = 0.018
"""Share of the picture's width that a pass needs to hold its number."""
MOST_WAYS = 500
"""Maximum number of messages between stages that are drawn."""


def draw_lanes(timeline: Timeline, from_ms: float | None, to_ms: float | None) -> Figure:
    """The picture of ``timeline`` between two times in ms, by default from the first pass to the last one's end. Raises
    UserError where nothing lies between them."""
    first_s = min((span.began_s for span in timeline.spans), default=0.0)
    last_s = max((span.ended_s for span in timeline.spans), default=timeline.ended_s)
    start = 1e3 * first_s if from_ms is None else from_ms
    end = 1e3 * last_s if to_ms is None else to_ms
    if end <= start or start > 1e3 * timeline.ended_s or end < 0:
        goes = f"the trace goes from 0 to {1e3 * timeline.ended_s:.0f}"
        refuse(f"nothing lies between {start:g} and {end:g} ms", goes)
    order = [ORCHESTRATOR, *(role for role in timeline.ranks if role >= FIRST_DRAFTER)]
    order += [role for role in timeline.ranks if ORCHESTRATOR < role < FIRST_DRAFTER]
    lanes = {address: place for place, address in enumerate(order)}
    figure = new_figure(WIDTH_INCHES, 1.0 + LANE_INCHES * len(lanes), timeline.execution, _about(timeline))
    axes = figure.add_subplot()
    tidy(axes)
    axes.set_xlim(start, end)
    axes.set_ylim(len(lanes) - 0.5, -HALF)
    axes.set_yticks(range(len(lanes)), [_lane_name(timeline, address) for address in order])
    axes.set_xlabel("ms", size=9)
    axes.tick_params(axis="y", length=0)
    spans = [span for span in timeline.spans if _overlaps(span.began_s, span.ended_s, start, end)]
    words = [word for word in timeline.words if _overlaps(word.sent_s, word.heard_s, start, end)]
    colours = request_colours(timeline)
    _draw_passes(axes, spans, lanes, end - start)
    _draw_shares(axes, spans, lanes, colours)
    _draw_emissions(axes, timeline, start, end)
    _draw_words(axes, words, lanes)
    _add_legend(figure, {span.outcome for span in spans if not (colours and _is_shown(span))}, words, colours)
    return figure


def request_colours(timeline: Timeline) -> dict[int, str]:
    """The colour of each request by its number; empty where the outcomes have the colours: where requests are many, or
    no pass has rows of several."""
    numbers = dict.fromkeys(request.number for request in timeline.requests)
    is_shared = any(len(span.shares) > 1 for span in timeline.spans)
    return (
        dict(zip(numbers, REQUEST_COLOURS, strict=False)) if is_shared and len(numbers) <= len(REQUEST_COLOURS) else {}
    )


def _about(timeline: Timeline) -> list[str]:
    header, hosts = timeline.header, sorted(set(timeline.hosts.values()))
    where = hosts[0] if len(hosts) == 1 else f"{len(hosts)} hosts"
    is_real = timeline.execution == "real"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(timeline.began_at)) if is_real else ""
    forced = "forced acceptance" if header.config.get("forced_acceptance") else ""
    requests = f"{len(timeline.requests)} requests" if len(timeline.requests) > 1 else ""
    return [f"policy {timeline.policy}", requests, f"{header.ranks} ranks on {where}", when, forced]


def _lane_name(timeline: Timeline, address: int) -> str:
    return f"{address_name(address)}\nrank {timeline.ranks[address]}"


def _overlaps(began_s: float, ended_s: float | None, start: float, end: float) -> bool:
    return ended_s is not None and 1e3 * ended_s >= start and 1e3 * began_s <= end


def _draw_passes(axes: Axes, spans: list[Span], lanes: dict[int, int], shown_ms: float) -> None:
    for address, lane in lanes.items():
        mine = [span for span in spans if span.address == address]
        for outcome, fill in FILLS.items():
            bars = [_extent(span) for span in mine if span.outcome is outcome]
            edge = GREY if outcome is Outcome.UNFINISHED else "white"
            axes.broken_barh(bars, (lane - HALF, 2 * HALF), facecolors=fill, edgecolors=edge, linewidth=0.4, zorder=2)
        for span in mine:
            began, length = _extent(span)
            if span.outcome is Outcome.PARTLY:  # its lower part: the rows that were accepted
                share = 2 * HALF * span.accepted / span.rows
                axes.broken_barh([(began, length)], (lane + HALF - share, share), facecolors=BLUE, zorder=3)
            if length > LEAST_LETTERED * shown_ms and address < FIRST_DRAFTER:
                ink = INK if span.outcome in (Outcome.WASTED, Outcome.UNFINISHED, Outcome.DRAFT) else "white"
                place: dict[str, Any] = {"ha": "center", "va": "center", "clip_on": True, "zorder": 4}
                axes.text(began + length / 2, lane, str(span.number), size=7, color=ink, **place)


def _is_shown(span: Span) -> bool:
    """Whether the shares of a pass are drawn, rather than its outcome."""
    return bool(span.shares) and span.outcome not in (Outcome.UNFINISHED, Outcome.CANCELLED)


def _draw_shares(axes: Axes, spans: list[Span], lanes: dict[int, int], colours: dict[int, str]) -> None:
    """Draw the shares of requests, from the upper edge of a pass to the lower one, over its outcome."""
    pale: dict[int, list[list[tuple[float, float]]]] = {number: [] for number in colours}
    dark: dict[int, list[list[tuple[float, float]]]] = {number: [] for number in colours}
    for span in spans if colours else ():
        if not _is_shown(span):
            continue
        top, row = lanes[span.address] - HALF, 2 * HALF / sum(share.rows for share in span.shares)
        for number, rows, accepted in span.shares:
            bottom, right = top + rows * row, rows if span.outcome is Outcome.PREFILL else accepted
            pale[number].append(_rectangle(span, top, bottom))
            dark[number].append(_rectangle(span, bottom - right * row, bottom))
            top = bottom
    for number, colour in colours.items():
        axes.add_collection(PolyCollection(pale[number], facecolors=_tint(colour), linewidths=0, zorder=3.1))
        axes.add_collection(PolyCollection(dark[number], facecolors=colour, linewidths=0, zorder=3.2))


def _rectangle(span: Span, top: float, bottom: float) -> list[tuple[float, float]]:
    left, length = _extent(span)
    return [(left, top), (left + length, top), (left + length, bottom), (left, bottom)]


def _tint(colour: str) -> tuple[float, ...]:
    return tuple(1 - TINT * (1 - part) for part in to_rgb(colour))


def _extent(span: Span) -> tuple[float, float]:
    """Beginning and length in ms."""
    return 1e3 * span.began_s, 1e3 * (span.ended_s - span.began_s)


def _draw_emissions(axes: Axes, timeline: Timeline, start: float, end: float) -> None:
    """On the orchestrator's lane a tick for every emission, as high as it has tokens."""
    most = max((tokens for _, tokens in timeline.emitted), default=1)
    for at_s, tokens in timeline.emitted:
        if start <= 1e3 * at_s <= end:
            axes.vlines(1e3 * at_s, HALF - 2 * HALF * tokens / most, HALF, color=INK, linewidth=1.2, zorder=3)


def _draw_words(axes: Axes, words: list[Word], lanes: dict[int, int]) -> None:
    def draw(chosen: Iterable[Word], color: str, zorder: float) -> None:
        ways = [_way(word, lanes) for word in chosen]
        axes.add_collection(LineCollection(ways, colors=color, linewidths=0.6, zorder=zorder))

    cancels = [word for word in words if isinstance(word.message.body, Cancel)]
    travels = [word for word in words if isinstance(word.message.body, Run | Result) and not word.is_tombstone]
    if len(travels) <= MOST_WAYS:
        draw(travels, GREY, 1)
    draw(cancels, VERMILLION, 5)
    heads = [_way(word, lanes)[1] for word in cancels]
    axes.scatter([x for x, _ in heads], [y for _, y in heads], marker="v", s=10, color=VERMILLION, lw=0, zorder=5)
    skips = [word for word in words if word.is_tombstone]
    places = [(1e3 * word.sent_s, lanes[word.message.source]) for word in skips]
    axes.scatter([x for x, _ in places], [y for _, y in places], marker="x", s=14, color=INK, lw=0.9, zorder=6)


def _way(word: Word, lanes: dict[int, int]) -> list[tuple[float, float]]:
    """From the edge of the sender's lane to that of the receiver's."""
    assert word.heard_s is not None
    source, dest = lanes[word.message.source], lanes[word.message.dest]
    down = HALF if dest > source else -HALF
    return [(1e3 * word.sent_s, source + down), (1e3 * word.heard_s, dest - down)]


def _add_legend(figure: Figure, outcomes: set[Outcome], words: list[Word], colours: dict[int, str]) -> None:
    names = {Outcome.PARTLY: "partly accepted (dark: its share)", Outcome.CANCELLED: "cancelled while computed"}
    entries: list[Patch | Line2D] = [
        Patch(fc=fill, ec=GREY if outcome is Outcome.UNFINISHED else "none", label=names.get(outcome, outcome))
        for outcome, fill in FILLS.items()
        if outcome in outcomes
    ]
    entries += [Patch(fc=colour, label=f"request {number}") for number, colour in colours.items()]
    if colours:
        entries.append(Patch(fc=PALE, label="a request's pale part: not accepted"))
    line: Callable[..., Line2D] = lambda **look: Line2D([], [], **look)  # noqa: E731
    entries.append(line(color=INK, marker="|", ls="", ms=9, mew=1.4, label="tokens emitted"))
    if any(isinstance(word.message.body, Cancel) for word in words):
        entries.append(line(color=VERMILLION, marker="v", ms=4, lw=0.8, label="cancel, sent to heard"))
    if any(word.is_tombstone for word in words):
        entries.append(line(color=INK, marker="x", ls="", ms=4, label="skipped (tombstone)"))
    look = {"fontsize": 8, "frameon": False, "handlelength": 1.2}
    figure.legend(handles=entries, loc="outside lower left", ncols=6, **look)
