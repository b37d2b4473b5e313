"""``pipeinfer bench fused``: exchanges of a group's ranks, fused with the kernels and as bulk collectives.

    all-reduce   a linear layer whose inputs are split, then the sum over the ranks, the residual and RMSNorm
    argmax       the head over a split vocabulary: the best token of each row

Each is measured five ways: the product alone (``compute_us``), the collective alone (``comm_us``), one after the other
(``bulk_us``; the same bits as fused), fused (``fused_us``), and with MPI's own sum instead of ours (``mpi_us``, other
bits). Weights are bf16 and come from memory: copies of a matrix take turns. Ways take turns too, forth and back; a
time is the slowest rank's. ``ratio``: the median of bulk / fused over all turns; it is between ``low`` and ``high`` in
95 of 100 draws of as many turns. ``path``: what the selector takes, by turns of its own before; ``auto_ratio``: bulk /
that. ``ceiling``: bulk / (bulk - comm), if all communication were hidden.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import addressof
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stages.kernels.cuts import default_cuts, part_of
from stages.kernels.group import Group, slot_nbytes, tile_panels
from stages.kernels.library import OUTPUT, CHead, CLayer, CModel, CRows, Library, library
from stages.kernels.linear import Linear, padded
from stages.models.ends import choose
from stages.models.split import token_ranges

if TYPE_CHECKING:
    from launch.mpi import World

HIDDEN = (1024, 2048, 4096, 8192)
ROWS = (1, 2, 4, 8, 16, 32, 64)
VOCABULARY = 16384
TURNS, TRIALS = 14, 4
TURN_S = 0.01
COLD_NBYTES = 64_000_000
"""Copies of a rank's matrix have so many bytes together, and are two at least."""
DRAWS = 1000
COLUMNS = {
    "op": 10, "rows": 4, "hidden": 6, "ranks": 5, "compute_us": 10, "comm_us": 9, "bulk_us": 9, "mpi_us": 9,
    "fused_us": 9, "ratio": 6, "low": 6, "high": 6, "path": 5, "auto_ratio": 10, "ceiling": 7,
}  # fmt: skip
Row = dict[str, Any]
Ways = Mapping[str, Callable[[], object]]


class AllReduce:
    """The ways to compute a row-parallel linear layer [hidden, hidden] and what follows, for up to ROWS[-1] rows."""

    op = "all-reduce"

    def __init__(self, lib: Library, group: Group, hidden: int) -> None:
        self._lib, self._group, self._hidden = lib, group, hidden
        mine, cuts = part_of(default_cuts(hidden), group.rank, group.size)
        weight = (torch.randn(hidden, len(mine)) / hidden**0.5).bfloat16()
        copies = max(2, -(-COLD_NBYTES // weight.nbytes))
        self._linears = [Linear.pack(weight, None, cuts) for _ in range(copies)]
        self._norm = torch.ones(hidden)
        self._layers = [self._layer(linear, len(mine)) for linear in self._linears]
        self._c = CModel(hidden, 1, 1, 16, 16, 16, 1, 0, 1e-5, 1.0, None)

    def _layer(self, linear: Linear, inputs: int) -> CLayer:
        layer = CLayer(mlp_norm=self._norm.data_ptr(), qkv=linear.c, output=linear.c, gate_up=linear.c, down=linear.c)
        layer.output_tile = tile_panels(self._hidden, self._hidden // self._group.size, 2)
        return layer

    def ways(self, rows: int) -> Ways:
        """What to time for ``rows`` rows."""
        group, kernels, hidden = self._group, self._lib.kernels, self._hidden
        mixed = torch.randn(rows, padded(self._linears[0].inputs))
        x, normed = torch.randn(rows, hidden), torch.zeros(rows, padded(hidden))
        parts = torch.zeros(group.size, rows * padded(hidden))
        faults = np.zeros(rows, np.int32)
        self._held = mixed, x, normed, parts, faults
        c = CRows(count=rows, x=x.data_ptr(), normed=normed.data_ptr(), mixed=mixed.data_ptr(), threads=256)
        c.faults, c.group = faults.ctypes.data, addressof(group.c)
        layers, linears, model, mine = cycle(self._layers), cycle(self._linears), addressof(self._c), parts[group.rank]

        def run(first: int, end: int, layer: CLayer, is_bulk: bool) -> None:
            c.first, c.end, c.parts = first, end, parts.data_ptr() if is_bulk else None
            kernels.layer(model, addressof(layer), addressof(c))

        def bulk(bring: Callable[[], None]) -> None:
            layer = next(layers)
            run(OUTPUT, OUTPUT + 1, layer, is_bulk=True)
            bring()
            run(OUTPUT + 1, OUTPUT + 2, layer, is_bulk=True)

        def compute() -> None:
            linear = next(linears)
            given = mixed.data_ptr(), mixed.shape[1], rows, mine.data_ptr(), padded(hidden)
            kernels.linear(addressof(linear.c), *given)

        assert group.channel is not None
        channel, shared, one = group.channel, parts.numpy(), mine.numpy()
        return {
            "compute": compute,
            "comm": lambda: group.bring(shared),
            "bulk": lambda: bulk(lambda: group.bring(shared)),
            "mpi": lambda: bulk(lambda: channel.add_up(one)),
            "fused": lambda: run(OUTPUT, OUTPUT + 2, next(layers), is_bulk=False),
        }


class Argmax:
    """The ways to find the best token, with a vocabulary of VOCABULARY tokens that is split."""

    op = "argmax"

    def __init__(self, lib: Library, group: Group, hidden: int) -> None:
        self._lib, self._group, self._hidden = lib, group, hidden
        mine = token_ranges(VOCABULARY, group.size)[group.rank]
        weight = (torch.randn(len(mine), hidden) / hidden**0.5).bfloat16()
        self._linears = [Linear.pack(weight) for _ in range(max(2, -(-COLD_NBYTES // weight.nbytes)))]
        self._norm, self._positions = torch.ones(hidden), np.zeros(ROWS[-1], np.int64)

    def ways(self, rows: int) -> Ways:
        """What to time for ``rows`` rows. In bulk all logits travel, as in most systems."""
        group, kernels, x = self._group, self._lib.kernels, torch.randn(rows, self._hidden)
        linears, columns = cycle(self._linears), self._linears[0].outputs
        parts = torch.zeros(group.size, rows * columns)
        place = self._norm.data_ptr(), self._positions.ctypes.data
        mine, assembled = parts[group.rank], torch.zeros(rows, VOCABULARY)

        def compute() -> None:
            given = x.data_ptr(), self._hidden, rows, mine.data_ptr(), columns
            kernels.linear(addressof(next(linears).c), *given)

        def best() -> None:
            for rank in range(group.size):
                assembled[:, rank * columns :][:, :columns] = parts[rank].view(rows, columns)
            assembled.argmax(1)

        def fused() -> None:
            head = CHead(addressof(next(linears).c), *place, None, None, 1e-5)
            choose(self._lib, group, head, VOCABULARY, VOCABULARY, x, with_logits=False)

        def bulk() -> None:
            compute()
            group.bring(shared)
            best()

        assert group.channel is not None
        shared = parts.numpy()
        return {"compute": compute, "comm": lambda: group.bring(shared), "bulk": bulk, "mpi": bulk, "fused": fused}


def measure(
    world: World, ranks: int, all_hidden: Sequence[int] = HIDDEN, all_rows: Sequence[int] = ROWS
) -> Iterator[Row]:
    """All rows, on the head; on other ranks the same without content. Collective."""
    lib = library()
    assert lib is not None
    lib.set_threads(max(1, world.cores.fair))
    torch.manual_seed(world.rank)
    slot = slot_nbytes([max(all_hidden)], [VOCABULARY])
    group = world.group(ranks, world.rank if world.rank < ranks else None, slot, "on", 60.0)
    assert group is not None
    with torch.inference_mode():
        for kind in (AllReduce, Argmax):
            for hidden in all_hidden:
                op = kind(lib, group, hidden)
                for rows in all_rows:
                    yield _row(world, group, op.op, rows, hidden, op.ways(rows))


def _row(world: World, group: Group, op: str, rows: int, hidden: int, ways: Ways) -> Row:
    counts = _counts(world, ways)
    trial = [_turn(world, ways, counts, turn, ("bulk", "fused")) for turn in range(TRIALS)]
    medians = {name: statistics.median(turn[name] for turn in trial) for name in ("bulk", "fused")}
    path = "fused" if medians["fused"] <= medians["bulk"] else "bulk"
    turns = [_turn(world, ways, counts, turn, tuple(ways)) for turn in range(TURNS)]
    took = {f"{name}_us": 1e6 * statistics.median(turn[name] for turn in turns) for name in ways}
    ratios = [turn["bulk"] / turn["fused"] for turn in turns]
    low, high = _interval(ratios)
    bulk, comm = took["bulk_us"], min(took["comm_us"], 0.99 * took["bulk_us"])
    return {
        "op": op,
        "rows": rows,
        "hidden": hidden,
        "ranks": group.size,
        **took,
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "path": path,
        "auto_ratio": statistics.median(ratios) if path == "fused" else 1.0,
        "ceiling": bulk / (bulk - comm),
    }


def _counts(world: World, ways: Ways) -> dict[str, int]:
    """How often each way is called in a turn, the same on all ranks."""
    found = {}
    for name, run in ways.items():
        run()
        began = time.perf_counter()
        run()
        run()
        found[name] = max(2, int(TURN_S / world.slowest((time.perf_counter() - began) / 2)))
    return found


def _turn(world: World, ways: Ways, counts: Mapping[str, int], turn: int, names: Sequence[str]) -> dict[str, float]:
    """Seconds of a call of each way, of the slowest rank; every other turn backwards."""
    found = {}
    for name in names[:: -1 if turn % 2 else 1]:
        world.slowest(0.0)  # all begin together
        began = time.perf_counter()
        for _ in range(counts[name]):
            ways[name]()
        found[name] = world.slowest(time.perf_counter() - began) / counts[name]
    return found


def _interval(ratios: Sequence[float]) -> tuple[float, float]:
    dice = random.Random(1)
    medians = sorted(statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(DRAWS))
    return medians[DRAWS * 25 // 1000], medians[DRAWS * 975 // 1000]


def heading() -> str:
    """The line over a table."""
    return "# " + " ".join(f"{name:>{width}}" for name, width in COLUMNS.items())


def line(row: Row) -> str:
    """``row`` under that heading."""
    shown = {name: f"{value:.{1 if name.endswith('us') else 2}f}" if isinstance(value, float) else str(value)
             for name, value in row.items()}  # fmt: skip
    return "  " + " ".join(f"{shown[name]:>{width}}" for name, width in COLUMNS.items())
