"""Whether exchanges of a group are faster fused or in bulk, by the number of rows: tried when the models are loaded.

The leader decides alone, and says with every pass which path its exchanges take; so all ranks take the same one."""

from __future__ import annotations

import time
from collections.abc import Callable

from pipeinfer.core.ports import Payload, ShardModel
from pipeinfer.core.slots import batch_in_order
from stages.models.group_shard import Team

ROWS = (1, 8, 64)
TURNS = (True, False, False, True, True, False)
"""Fused or not: forth and back, because machines warm up."""
MOST_S = 0.5
"""No more rows are tried where a layer takes so long."""


def choose_path(
    group: Team,
    shard: ShardModel,
    capacity: int,
    blank: Callable[[int], Payload] | None,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Let ``group`` take the faster path at each number of rows, by the first layer of ``shard``, which has as many
    slots as ``capacity``. ``blank``: makes the activations that enter it, None for a shard that embeds."""
    chosen: dict[int, bool] = {}
    for rows in ROWS:
        if rows > capacity:
            break
        took: dict[bool, float] = {}
        for is_fused in TURNS:
            group.path = {0: is_fused}
            began = clock()
            passes = shard.forward(batch_in_order([0] * rows, 0), blank(rows) if blank else None)
            next(passes)
            passes.close()
            spent_s = clock() - began
            took[is_fused] = min(took.get(is_fused, spent_s), spent_s)
        chosen[rows] = took[True] <= took[False]
        if took[chosen[rows]] > MOST_S:
            break
    group.path = chosen or {0: True}
