"""Hardware descriptions: the processor, memory and links of a stage. They are TOML files in benchmarks/hardware.

Each number is a TOML table of its own, with its kind and its source. ``nominal`` numbers are from a data sheet,
``sustained`` numbers were measured, ``assumed`` numbers are neither. A description may name another one as its ``base``
and override numbers.

    seconds(bytes, r) = bytes / bandwidth(r)

A description of a measured host also has curves: bandwidth(r) is the measured rate in bytes/s at which a kernel reads
weights (or keys and values) with r rows; there may be one for each format of quantised weights. A roofline assumes that
rows are free until arithmetic takes longer than reading the weights. Kernels violate this assumption: some take four
times as long for two rows as for one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeinfer.core.config import DTYPES
from pipeinfer.core.links import Link
from pipeinfer.costs.paths import find
from pipeinfer.costs.tables import Table

KINDS = ("nominal", "sustained", "assumed")
CURVES = ("linear", "attention")
OF_DTYPE = ("peak", "overhead", *CURVES)
WEIGHTS = ("int8", "int4", "fp6", "fp8", "q8_0", "q4_0", "q3_k", "q4_k", "q5_k", "q6_k")
"""Formats of few bits whose curve of reading weights a description may have, in the group ``weights``."""
GROUPS = {
    "processor": ("cores",),
    "memory": ("capacity", "bandwidth"),
    "link": ("latency", "bandwidth"),
    "disk": ("bandwidth",),
    **dict.fromkeys(DTYPES, OF_DTYPE),
    "weights": WEIGHTS,
}
NEEDED = ("processor.cores", "memory.capacity", "memory.bandwidth", "link.latency", "link.bandwidth")


@dataclass(frozen=True, slots=True)
class Curve:
    """Bytes per second that a kernel reads, by rows; ``rows`` ascend from 1."""

    rows: tuple[int, ...]
    bandwidth: tuple[float, ...]

    def seconds(self, nbytes: float, rows: int) -> float:
        """Seconds for ``nbytes``: linear in time between measured numbers of rows, proportional to rows beyond the
        last."""
        place = bisect_left(self.rows, rows)
        if place == len(self.rows):
            return nbytes / self.bandwidth[-1] * rows / self.rows[-1]
        high = nbytes / self.bandwidth[place]
        if self.rows[place] == rows:
            return high
        low = nbytes / self.bandwidth[place - 1]
        return low + (high - low) * (rows - self.rows[place - 1]) / (self.rows[place] - self.rows[place - 1])


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Arithmetic in one dtype. ``peak``: FLOP/s. ``overhead_s``: seconds of a layer beside its arithmetic.

    ``linear``: the curve of reading weights. ``attention``: the curve of reading keys and values, by rows times query
    heads per KV head. None if not measured; the roofline then applies."""

    peak: float
    overhead_s: float
    linear: Curve | None = None
    attention: Curve | None = None


@dataclass(frozen=True, slots=True)
class Hardware:
    """The hardware of one stage: ``cores``, ``memory_nbytes`` bytes of memory, its ``bandwidth`` in bytes/s, and a link
    to each other stage. ``disk``: bytes/s at which weights are streamed; None if the description has none."""

    name: str
    title: str
    cores: int
    memory_nbytes: int
    bandwidth: float
    link: Link
    arithmetic: Mapping[str, Arithmetic]  # by dtype
    weights: Mapping[str, Curve] = field(default_factory=dict)  # of reading quantised weights, by format
    disk: float | None = None


def read_hardware(name: str) -> Hardware:
    """The description in the file ``name``, or of that name in benchmarks/hardware. Raises UserError for a description
    that is missing, lacks a number or a source, or has an unknown key."""
    file = Table.read(find("hardware", name))
    figures = _figures(file)
    dtypes = [dtype for dtype in DTYPES if any(key.startswith(f"{dtype}.") for key in figures)] or list(DTYPES[:1])
    for key in (*NEEDED, *(f"{dtype}.{what}" for dtype in dtypes for what in ("peak", "overhead"))):
        if key not in figures:
            file.bad(key, "is missing")

    def value(key: str) -> float:
        return figures[key].number("value")

    return Hardware(
        name=file.path.stem,
        title=file.text("title"),
        cores=figures["processor.cores"].count("value"),
        memory_nbytes=int(value("memory.capacity")),
        bandwidth=value("memory.bandwidth"),
        link=Link(value("link.latency"), bandwidth=value("link.bandwidth")),
        arithmetic={dtype: _arithmetic(dtype, figures) for dtype in dtypes},
        weights={name: _curve(figures[key]) for name in WEIGHTS if (key := f"weights.{name}") in figures},
        disk=value("disk.bandwidth") if "disk.bandwidth" in figures else None,
    )


def _figures(file: Table) -> dict[str, Table]:
    """All numbers of ``file`` and of its base, by group and name."""
    file.only(("title", "base", *GROUPS))
    found: dict[str, Table] = {}
    for group in file.words.keys() & GROUPS.keys():
        table = file.table(group)
        table.only(GROUPS[group])
        found |= {f"{group}.{name}": _checked(table.table(name), name) for name in table.words}
    if "base" not in file.words:
        return found
    base = Table.read(find("hardware", file.text("base")))
    if "base" in base.words:
        file.bad("base", f"{base.path.stem} has a base itself")
    return {**_figures(base), **found}


def _checked(figure: Table, name: str) -> Table:
    figure.only((*(("rows", "bandwidth") if name in (*CURVES, *WEIGHTS) else ("value",)), "kind", "source"))
    figure.text("kind", KINDS)
    figure.text("source")
    if name in (*CURVES, *WEIGHTS):
        _curve(figure)
    else:
        figure.number("value")
    return figure


def _curve(figure: Table) -> Curve:
    rows, bandwidth = figure.numbers("rows"), figure.numbers("bandwidth")
    whole = tuple(sorted({int(row) for row in rows}))
    if rows != whole or rows[0] != 1:
        figure.bad("rows", f"must be whole numbers that ascend from 1, not {list(rows)}")
    if len(rows) != len(bandwidth):
        figure.bad("bandwidth", f"has {len(bandwidth)} numbers for {len(rows)} numbers of rows")
    return Curve(whole, bandwidth)


def _arithmetic(dtype: str, figures: Mapping[str, Table]) -> Arithmetic:
    peak, overhead_s = (figures[f"{dtype}.{what}"].number("value") for what in ("peak", "overhead"))
    curves = {name: _curve(figures[f"{dtype}.{name}"]) for name in CURVES if f"{dtype}.{name}" in figures}
    return Arithmetic(peak, overhead_s, **curves)
