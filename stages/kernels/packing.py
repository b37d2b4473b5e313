"""How quantised weights are packed for the C library: what a panel holds, and where."""

from __future__ import annotations

import ctypes
import math
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import replace

import torch
from torch import Tensor

from stages.kernels.cuts import BLOCK
from stages.kernels.library import PANEL
from stages.quantization.matrix import QuantizedMatrix

LINE = 64
SCALES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
CODES = {"integer": 0, "e3m2": 1, "e4m3": 2, "e3m0": 3}
"""Numbers of the kinds of codes."""
WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits of codes that kernels have; others are stored in the next ones."""
MOST_RECORD = 1024
"""Inputs of a record, where several groups make one."""


class CPacking(ctypes.Structure):
    """``struct packing`` of native/kernels.h."""

    _fields_ = (
        *((name, c_int32) for name in ("bits", "kind", "scale_format", "group", "span", "record", "parts", "zero")),
        *((name, c_int32) for name in ("minima", "factors", "minimum_factors", "zeros")),
        *((name, c_int32) for name in ("header_nbytes", "record_nbytes")),
        ("panel_nbytes", c_int64),
    )


class CParts(ctypes.Structure):
    """``struct parts`` of native/pack.c."""

    _fields_ = tuple(
        (name, c_void_p) for name in ("codes", "scales", "minima", "factors", "minimum_factors", "zeros")
    )


def can_pack(matrix: QuantizedMatrix) -> bool:
    """Whether kernels have the format of ``matrix``. They do not have groups or spans of fewer than 16 inputs, factors
    beyond a byte, or numbers that are none."""
    if any(size < matrix.shape[1] and size % BLOCK and size != 16 for size in (matrix.group, matrix.span)):
        return False
    if matrix.kind not in CODES:
        return False
    factors = [table for table in (matrix.factors, matrix.minimum_factors) if table is not None]
    if any(table.numel() and (int(table.min()) < -128 or int(table.max()) > 127) for table in factors):
        return False
    return matrix.kind != "e4m3" or not bool(((matrix.codes & 127) == 127).any())


def normal(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same numbers with groups and spans that are 16 or multiples of 32 inputs, and no longer than a row."""
    inputs = -(-matrix.shape[1] // BLOCK) * BLOCK
    return replace(matrix, group=min(matrix.group, inputs), span=min(matrix.span, inputs))


def packing_of(matrix: QuantizedMatrix) -> CPacking:
    """How a ``normal`` matrix is packed. A record has as many groups as waste least of the last line of a header."""
    inputs, size = -(-matrix.shape[1] // BLOCK) * BLOCK, matrix.scales.element_size()
    has = [table is not None for table in (matrix.minima, matrix.factors, matrix.minimum_factors)]
    has.append(isinstance(matrix.zeros, Tensor))
    least = min(inputs, math.lcm(matrix.group, matrix.span, BLOCK))

    def places(record: int) -> tuple[list[int], int]:
        spans, groups = -(-record // matrix.span), -(-record // matrix.group)
        end, found = PANEL * size * spans, []
        for is_there, nbytes in zip(has, (size * spans, groups, groups, groups), strict=True):
            found.append(end if is_there else 0)
            end += PANEL * nbytes if is_there else 0
        return found, -(-end // LINE) * LINE

    records = [least * times for times in (1, 2, 4, 8) if times == 1 or least * times <= min(inputs, MOST_RECORD)]
    record = min(records, key=lambda record: (places(record)[1] / record, record))
    bits = next(width for width in WIDTHS if width >= matrix.bits)
    tables, header = places(record)
    record_nbytes = header + record // BLOCK * bits * LINE
    whole, rest = divmod(inputs, record)
    panel = whole * record_nbytes + (header + rest // BLOCK * bits * LINE if rest else 0)
    kind, zero = CODES[matrix.kind], 0 if isinstance(matrix.zeros, Tensor) else matrix.zeros
    parts = 2 if min(matrix.group, matrix.span) < BLOCK else 1
    sizes = matrix.group, matrix.span, record, parts, zero
    return CPacking(bits, kind, SCALES[matrix.scales.dtype], *sizes, *tables, header, record_nbytes, panel)


def parts_of(matrix: QuantizedMatrix) -> tuple[CParts, list[Tensor]]:
    """Where the C library finds the tables of ``matrix``, and the tensors that must live meanwhile."""
    zeros = matrix.zeros if isinstance(matrix.zeros, Tensor) else None
    bytes_of = [(matrix.factors, torch.int8), (matrix.minimum_factors, torch.int8), (zeros, torch.uint8)]
    tables = [matrix.codes, matrix.scales, matrix.minima]
    tables += [None if table is None else table.to(dtype) for table, dtype in bytes_of]
    held = [None if table is None else table.contiguous() for table in tables]
    return CParts(*[table.data_ptr() if table is not None else None for table in held]), [
        table for table in held if table is not None
    ]
