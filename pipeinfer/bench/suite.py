"""Suites: TOML files that say what is measured. Every list in a ``[[points]]`` table is an axis; a table stands for all
combinations of its axes, in the order of its keys, the last one running fastest."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from pipeinfer.core.errors import refuse
from pipeinfer.costs.paths import find

EXECUTIONS = ("real", "emulated", "simulated")
VECTORS = ("claims", "burst", "acceptance", "set", "row_costs")
"""Keys of a point that are lists themselves; a list of lists is an axis."""
ARRIVALS = ("at once", "poisson", "bursts")
ROW_COUNTS = (1, 2, 4, 8, 16, 32)
"""Rows of the passes that ``row_costs`` are of."""


@dataclass(frozen=True, slots=True)
class Point:
    """One place at which all policies are measured.

    ``ranks``: all of them, a drafter's too (0: as many as there are). Emulated and simulated: the draft's k-th choice
    is right with ``acceptance[k]``, by default ``spread(top1)``; it believes ``claims`` and errs in ``burst`` (see
    EmulatedSpec). Passes cost what ``hardware`` makes of ``target`` and ``draft`` (model shapes), or, without a
    ``hardware``, ``stage_ms`` for any number of rows where a drafter has a rank, and ``draft_time`` times that for a
    pass of the draft. Real: ``target`` and ``draft`` are models, ``builtin*300M`` for one as costly as that (see
    inflate), ``shaped`` for a pair of 620M and 99M weights (see shaped_pair); an acceptance is forced upon them,
    weights may be random. ``prompt_tokens``: 0 for prompts as they come. ``set``: changes to every policy that drafts,
    as ``knob=value``. ``dtype``, ``numerics``, ``activations`` and ``threads`` (of a rank; 0 for its fair share): see
    Engine. ``tp``: ranks that share a stage; ``fused``, of real ones: how they exchange activations, see Engine;
    ``efficiency``, of others: the share of ``tp`` times a rank's speed that they have together before exchanges.
    ``requests``, not real: that are decoded at once, 0 for one after the other; ``arrivals``: how they come (see
    load.py); ``row_costs``: without a ``hardware``, times of passes of ROW_COUNTS rows in any unit, of target and
    draft."""

    ranks: int = 0
    top1: float = 0.0
    acceptance: tuple[float, ...] = ()
    claims: tuple[float, ...] = ()
    burst: tuple[float, ...] = ()
    draft_time: float = 0.0
    stage_ms: float = 20.0
    hardware: str = ""
    target: str = ""
    draft: str = ""
    dtype: str = "auto"
    prompt_tokens: int = 0
    tokens: int = 128
    prompts: int = 1
    temperature: float = 0.0
    random_weights: bool = False
    numerics: str = "portable"
    activations: str = "fp32"
    threads: int = 0
    set: tuple[str, ...] = ()
    tp: int = 1
    fused: str = "auto"
    efficiency: float = 0.9
    requests: int = 0
    arrivals: str = ARRIVALS[0]
    row_costs: tuple[float, ...] = ()

    def processes(self, execution: str) -> int:
        """Ranks of the job: all, but where groups are emulated only those with a role: a drafter's, and one of each
        group."""
        return self.ranks if execution == "real" else (self.ranks - 1) // self.tp + 1


@dataclass(frozen=True, slots=True)
class Suite:
    """What is measured, and how by default. ``minutes``: what to expect on two cores, by execution. ``once``: policies
    and peers that are measured in the first repeat only. ``passes``: on one rank, single passes of the models are timed
    too, beside llama.cpp's where it is among the policies; what chains could gain with them is the ideal."""

    name: str
    title: str
    execution: str
    policies: tuple[str, ...]
    points: tuple[Point, ...]
    repeats: int = 3
    once: tuple[str, ...] = ()
    passes: bool = False
    tune: bool = False  # rivals at their best sizes for each point
    minutes: Mapping[str, float] = field(default_factory=dict)


def read_suite(name: str) -> Suite:
    """The suite in the file ``name``, or of that name in benchmarks/suites. Raises UserError for what is no suite."""
    path = find("suites", name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return _suite(path.stem, content)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        refuse(f"{path} cannot be read ({error})", "mend it")
    except (TypeError, ValueError, KeyError) as error:
        refuse(f"{path} is no suite ({error})", "see docs/benchmarks.md, or take one of benchmarks/suites as a model")


def _suite(name: str, content: dict[str, Any]) -> Suite:
    points = [point for table in content.pop("points") for point in _points(table)]
    _check_names(content, Suite)
    content["once"] = tuple(content.get("once", ()))
    suite = Suite(name, content.pop("title"), points=tuple(points), policies=tuple(content.pop("policies")), **content)
    if suite.execution not in EXECUTIONS:
        raise ValueError(f"execution {suite.execution!r}, not one of {', '.join(EXECUTIONS)}")
    if suite.repeats < 1 or not suite.points or not suite.policies:
        raise ValueError("it needs a point, a policy and a repeat at least")
    return suite


def _points(table: dict[str, Any]) -> Iterator[Point]:
    has_stages = "stages" in table
    if has_stages:
        table = {"ranks": table["stages"], **{key: value for key, value in table.items() if key != "stages"}}
    _check_names(table, Point)
    for values in itertools.product(*(_axis(key, value) for key, value in table.items())):
        point = checked(replace(Point(), **dict(zip(table, values, strict=True))))
        yield replace(point, ranks=point.tp * point.ranks + 1) if has_stages else point  # a drafter has one more


def _axis(key: str, value: Any) -> list[Any]:
    if key not in VECTORS:
        return value if isinstance(value, list) else [value]
    rows = value if value and isinstance(value[0], list) else [value]
    return [tuple(float(value) if isinstance(value, int) else value for value in row) for row in rows]


def _check_names(table: Mapping[str, Any], kind: type) -> None:
    known = {knob.name for knob in fields(kind)}
    if odd := sorted(table.keys() - known):
        raise ValueError(f"unknown key {odd[0]!r}; there are {', '.join(sorted(known))}")


def checked(point: Point) -> Point:
    """``point``, if its numbers can be meant; else ValueError."""
    for knob in fields(Point):
        value = getattr(point, knob.name)
        if type(knob.default) is float and isinstance(value, int):
            value = float(value)
        if type(value) is not type(knob.default):
            raise ValueError(f"{knob.name} must be of type {type(knob.default).__name__}, not {value!r}")
        numbers = value if isinstance(value, tuple) else (value,)
        if any(not isinstance(number, str) and number < 0 for number in numbers):
            raise ValueError(f"{knob.name} must not be negative, not {value!r}")
    if point.tp < 1:
        raise ValueError(f"tp must be 1 or more, not {point.tp}")
    if not 0 < point.efficiency <= 1:
        raise ValueError(f"efficiency must be above 0 and at most 1, not {point.efficiency}")
    if point.arrivals not in ARRIVALS:
        raise ValueError(f"arrivals must be one of {', '.join(ARRIVALS)}, not {point.arrivals!r}")
    if point.row_costs and (len(point.row_costs) != len(ROW_COUNTS) or not all(point.row_costs)):
        raise ValueError(f"row_costs must be {len(ROW_COUNTS)} times, not {point.row_costs!r}")
    if point.tokens < 2 or point.prompts < 1:
        raise ValueError("a point needs a prompt and two tokens at least")
    if point.top1 > 1 or sum(point.acceptance) > 1 + 1e-9:
        raise ValueError("probabilities of a draft's choices exceed 1")
    return point
