"""Running a suite: point by point, all policies in turn within each repeat, so that a disturbance affects all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from pipeinfer.bench.contenders import Contender, contender, ideal_speed
from pipeinfer.bench.fingerprint import fingerprint
from pipeinfer.bench.load import reference_speed
from pipeinfer.bench.report import Report
from pipeinfer.bench.rows import make_row
from pipeinfer.bench.sample import Sample
from pipeinfer.bench.scenario import Scenario, scenario
from pipeinfer.bench.simulated import simulate_all, tuned
from pipeinfer.bench.suite import Point, Suite
from pipeinfer.core.metrics import percentile

if TYPE_CHECKING:
    from launch.mpi import World

CONFIG = (
    "suite", "execution", "policy", "settings", "ranks", "acceptance", "draft_time", "hardware", "target", "draft",
    "dtype", "prompt_tokens", "tokens", "set", "claims", "burst",
)  # fmt: skip
"""What a fingerprint's digest of the configuration is made of."""
OF_GROUPS = ("tp", "fused", "efficiency")
"""The same, where ranks share stages."""
OF_LOADS = ("requests", "arrivals", "row_costs")
"""The same, where there are many requests or measured costs."""


def run_simulated(suite: Suite, report: Report) -> None:
    """Measure ``suite`` in virtual time, on all cores."""
    with _pool() as pool:
        for point in suite.points:
            here = scenario(point)
            ideals = _ideals(here, suite.repeats, pool)
            contenders = _contenders(suite, point)
            contenders = tuned(here, contenders, pool) if suite.tune else contenders
            report.announce(here.ceiling, percentile(ideals, 0.5))
            samples = simulate_all(here, contenders, suite.repeats, pool)
            report.add(_emulated_rows(suite, here, dict(zip(contenders, samples, strict=True)), ideals, ""))


def run_emulated(suite: Suite, report: Report | None, world: World) -> None:
    """Measure ``suite`` on the ranks of ``world``; collective. ``report`` is None on ranks other than the head."""
    with _pool() as pool:
        for point in suite.points:
            here = scenario(point)
            contenders = _contenders(suite, point)
            ideals: list[float] = []
            if report is not None:
                contenders = tuned(here, contenders, pool) if suite.tune else contenders
                ideals = _ideals(here, suite.repeats, pool)
                report.announce(here.ceiling, percentile(ideals, 0.5))
            told = world.broadcast({"contenders": [one.fields() for one in contenders]})
            contenders = [Contender.of(fields) for fields in told["contenders"]]
            found = _emulate(world, here, contenders, suite.repeats)
            if report is not None:
                report.add(_emulated_rows(suite, here, found, ideals, world.library))


def _emulate(
    world: World, here: Scenario, contenders: Sequence[Contender], repeats: int
) -> dict[Contender, list[Sample]]:
    from pipeinfer.bench.emulated import emulate

    found: dict[Contender, list[Sample]] = {one: [] for one in contenders}
    with world.part(here.point.processes("emulated")) as part:
        if part is not None:
            for seed in range(repeats):
                for one in contenders:
                    sample = emulate(part, here, one, seed)
                    found[one] += [sample] if sample else []
    return found


def run_real(suite: Suite, report: Report | None, world: World) -> None:
    """Measure ``suite`` on the ranks of ``world``; collective. ``report`` is None on ranks other than the head."""
    from pipeinfer.bench.real import measure_point

    for point in suite.points:
        rows: list[dict[str, Any]] = []
        with world.part(point.ranks or world.size) as part:
            if part is not None:
                announce = report.announce if report is not None else lambda ceiling: None
                rows = measure_point(part, suite, point, announce)
        if report is not None:
            report.add(with_ratios(rows, world.library))
            report.explain(rows)


def _pool() -> ProcessPoolExecutor:
    # Fresh processes: forked ones would inherit MPI.
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"))


def _ideals(here: Scenario, repeats: int, pool: ProcessPoolExecutor) -> list[float]:
    """What ideal scheduling gives on each of the texts that are measured."""
    if here.point.requests:
        return [pool.submit(reference_speed, here).result()] * repeats
    return [job.result() for job in [pool.submit(ideal_speed, here, seed) for seed in range(repeats)]]


def _contenders(suite: Suite, point: Point) -> list[Contender]:
    return [contender(name, point.set) for name in suite.policies]


def _emulated_rows(
    suite: Suite, here: Scenario, found: Mapping[Contender, Sequence[Sample]], ideals: list[float], mpi: str
) -> list[dict[str, Any]]:
    rows = []
    for one, samples in found.items():
        facts = here.facts(one.policy) | {
            "settings": one.settings(),
            "ideal_tokens_per_s": percentile(ideals, 0.5),
            "ideal_samples": ideals,
        }
        rows.append(make_row(suite, here.point, one.name, samples, facts))
    return with_ratios(rows, mpi)


def with_ratios(rows: list[dict[str, Any]], mpi: str) -> list[dict[str, Any]]:
    """``rows`` of one point, each with its ratio to the plain one's speed and its fingerprint."""
    plain = next((row["tokens_per_s"]["median"] for row in rows if row["policy"] == "plain"), None)
    for row in rows:
        row["ratio_to_plain"] = row["tokens_per_s"]["median"] / plain if plain else None
        groups = {key: row[key] for key in (*OF_GROUPS, *OF_LOADS) if row.get(key)}
        row["fingerprint"] = fingerprint({key: row[key] for key in CONFIG} | groups, mpi)
    return rows
