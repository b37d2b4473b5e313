"""What a pass of a shard takes by its rows, measured once after loading: schedules know it before the first request.

A pass has a short context, in the lowest slots, which are zeros again afterwards. Each number of rows is tried at least
once, and then again as long as the budget lasts; its time is the least one found, because a pass may be late for many
reasons and is never early. Where passes are slow, one row and the most rows alone are tried. For emulated models the
seconds that they would rest count as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeinfer.core.ports import Payload, ShardModel
from pipeinfer.core.slots import batch_in_order

ROWS = (1, 2, 4, 8, 16)
CONTEXT = 16
"""Tokens before the rows."""
REPEATS = 8
BUDGET_S = 0.3
"""Seconds for further passes once each number of rows was tried."""
MOST_S = 3.0
"""After so many seconds no further pass begins."""

PassTimes = list[tuple[int, float]]


def pass_times(
    shard: ShardModel,
    capacity: int,
    blank: Callable[[int], Payload] | None = None,
    choices: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> PassTimes:
    """Rows and seconds of passes of ``shard``, which has ``capacity`` slots. ``blank``: makes the activations that
    enter it, None for a shard that embeds. ``choices``: how many tokens are chosen after each row, 0 for a shard that
    is not the last. Empty where nothing can be measured: a pass that fails will fail again where somebody waits."""
    sizes = [rows for rows in ROWS if rows <= capacity]
    best: dict[int, float] = {}
    began = clock()
    tried_s = 0.0
    try:
        for turn in range(1 + REPEATS):
            order = [*sizes[:1], *sizes] if turn else sizes[:1]
            while order:
                limit_s = MOST_S if turn < 2 else min(MOST_S, tried_s + BUDGET_S)
                if clock() - began > limit_s:
                    break
                rows = order.pop(0)
                seconds = _pass_s(shard, rows, min(CONTEXT, capacity - rows), blank, choices, clock)
                if not turn:  # the very first pass is slow for its own reasons: layers may still be loading
                    began = clock()
                    continue
                best[rows] = min(best.get(rows, seconds), seconds)
                if turn == 1 and len(order) == len(sizes) and len(sizes) * seconds > MOST_S:
                    order = sizes[-1:]  # rows may be free, as where weights are streamed: the extremes tell
            if turn == 1:
                tried_s = clock() - began
    except Exception:
        best.clear()
    clear = getattr(shard, "clear", None)
    if clear is not None:
        clear(min(capacity, CONTEXT + ROWS[-1]))
    return plausible(sorted(best.items()))


def plausible(times: PassTimes) -> PassTimes:
    """``times`` (in order of rows) without what another number of rows proves late: fewer rows take no longer, and more
    rows no longer than passes of fewer that have as many together."""
    found: PassTimes = []
    for index, (rows, _) in enumerate(times):
        least_s = min(seconds for _, seconds in times[index:])
        found.append((rows, min([least_s, *(rows / fewer * seconds for fewer, seconds in found)])))
    return found


def _pass_s(
    shard: ShardModel,
    rows: int,
    context: int,
    blank: Callable[[int], Payload] | None,
    choices: int,
    clock: Callable[[], float],
) -> float:
    """Seconds of one pass of ``rows`` after ``context`` tokens."""
    batch, hidden = batch_in_order([0] * rows, context), blank(rows) if blank else None
    began, rested_s = clock(), 0.0
    passes = shard.forward(batch, hidden)
    while True:
        try:
            rested_s += next(passes)
        except StopIteration as done:
            if choices:
                shard.sample(done.value, range(rows), choices)
            return clock() - began + rested_s


def together(found: Sequence[Mapping[str, Any]]) -> dict[str, PassTimes]:
    """The costs of a JobSpec, from each rank's ``{"stages": [...], "drafts": [...]}``, a PassTimes for each shard.
    Empty where a stage has none."""
    stages = [dict(times) for rank in found for times in rank["stages"]]
    drafts = [dict(times) for rank in found for times in rank["drafts"] if times]
    known = sorted(set.intersection(*map(set, stages))) if stages else []
    drafted = sorted(set.intersection(*map(set, drafts))) if drafts else []
    return {
        "row_costs": [(rows, max(times[rows] for times in stages)) for rows in known],
        "trip_costs": [(rows, sum(times[rows] for times in stages)) for rows in known],
        "draft_costs": [(rows, max(times[rows] for times in drafts)) for rows in drafted],
    }
