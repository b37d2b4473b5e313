"""A layer of a group whose exchanges are bulk collectives, between parts of the layer.

A pass of many rows goes by blocks of rows, a chain of products and collectives: while the parts of one block travel,
the next block is multiplied, and while those of the last block travel, the first goes on (Wang et al., ASPLOS'23,
decompose by columns; by rows the bits stay the same, for a row's result depends on no other row)."""

from __future__ import annotations

import ctypes
from ctypes import addressof
from itertools import pairwise

from torch import Tensor

from stages.kernels.group import Group
from stages.kernels.library import DOWN, OUTPUT, PHASES, CLayer, CModel, CRows, Library
from stages.kernels.linear import padded

BLOCKS, LEAST_ROWS = 3, 32
"""Blocks of a pass, where each has so many rows at least: each reads all weights."""


def compute_in_bulk(
    lib: Library, group: Group, model: CModel, layer: CLayer, rows: CRows, strides: tuple[int, int], parts: Tensor
) -> None:
    """One layer on ``rows``. ``strides``: floats of a row of rows.wide and of rows.mixed; ``parts``: memory for the
    parts of all ranks."""
    hidden, has_mlp = padded(model.hidden), layer.gate_up.columns > 0
    count = max(1, min(BLOCKS, rows.count // LEAST_ROWS))
    cuts = [rows.count * index // count for index in range(count + 1)]
    blocks = [_block(rows, begin, end, strides, model.hidden) for begin, end in pairwise(cuts)]
    views = [
        parts[group.size * hidden * begin : group.size * hidden * end].view(group.size, -1)
        for begin, end in pairwise(cuts)
    ]

    def run(some: CRows, first: int, end: int, view: Tensor) -> None:
        some.first, some.end, some.parts = first, end, view.data_ptr()
        lib.kernels.layer(addressof(model), addressof(layer), addressof(some))

    run(rows, 0, OUTPUT, parts)
    first = OUTPUT
    for last in (OUTPUT, DOWN) if has_mlp else (OUTPUT,):
        for index, (block, view) in enumerate(zip(blocks, views, strict=True)):
            if first > OUTPUT:
                group.finish(index)
            run(block, first, last + 1, view)
            group.start(index, view.numpy(), meanwhile=count > 1)
        first = last + 1
    for index, (block, view) in enumerate(zip(blocks, views, strict=True)):
        group.finish(index)
        run(block, first, PHASES, view)


def _block(rows: CRows, begin: int, end: int, strides: tuple[int, int], hidden: int) -> CRows:
    """The rows from ``begin`` to before ``end``, for the phases after attention."""
    block = CRows.from_buffer_copy(rows)
    block.count = end - begin
    block.x += 4 * begin * hidden
    block.normed += 4 * begin * padded(hidden)
    block.wide += 4 * begin * strides[0]
    block.mixed += 4 * begin * strides[1]
    block.faults += ctypes.sizeof(ctypes.c_int32) * begin
    return block
