"""Contenders: the policies of a suite at a point; with ``tune``, rivals at their best sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeinfer.bench.ideal import best_chain, best_tree, ideal
from pipeinfer.bench.scenario import DRAFT_ROWS, Scenario
from pipeinfer.costs.paths import BENCHMARKS
from speculation.schedules.policy import CONTINUOUS, Policy, read_policy
from stages.models.emulated import right_choices

SHIPPED_HEAD_SHARE = 2 / 3
"""Layers of PipeInfer's first stage, in those of another, in its script for eight nodes."""
SHIPPED = "-shipped"
"""Suffix of a rival that keeps its authors' settings where others are tuned."""
IDEAL_ROWS = [1 << power for power in range(CONTINUOUS.max_rows.bit_length())]


@dataclass(frozen=True, slots=True)
class Contender:
    """A policy under the name it has in the suite, read from ``source`` with ``changes`` (see read_policy).
    ``head_share``: see Scenario.shares."""

    name: str
    policy: Policy
    source: str
    changes: tuple[str, ...] = ()
    head_share: float = 1.0

    def settings(self) -> dict[str, Any]:
        """What was changed for the point, by tuning or by its own settings."""
        read = read_policy(self.source).settings()
        changed = {knob: value for knob, value in self.policy.settings().items() if value != read[knob]}
        return changed | ({"head_share": round(self.head_share, 3)} if self.head_share != 1.0 else {})

    def fields(self) -> dict[str, Any]:
        """Everything about it as a dictionary, for other ranks."""
        return asdict(self)

    @classmethod
    def of(cls, found: dict[str, Any]) -> Contender:
        """The contender that ``fields`` turned into ``found``, JSON in between."""
        return cls(**found | {"policy": Policy(**found["policy"]), "changes": tuple(found["changes"])})


def contender(name: str, changes: Sequence[str] = ()) -> Contender:
    """The contender ``name``: a built-in policy, one of benchmarks/baselines, or a file, with SHIPPED or without.
    Raises UserError."""
    plain_name = name.removesuffix(SHIPPED)
    path = BENCHMARKS / "baselines" / f"{plain_name}.toml"
    source = str(path) if path.is_file() else plain_name
    policy = read_policy(source)
    if policy.speculate and changes:
        policy = read_policy(source, changes)
    changes = tuple(changes) if policy.speculate else ()
    head_share = SHIPPED_HEAD_SHARE if plain_name != name and policy.schedule == "pipeinfer" else 1.0
    return Contender(Path(name).stem, policy, source, changes, head_share)


def variants(untuned: Contender, scenario: Scenario) -> list[Contender]:
    """The sizes to try for a rival in ``scenario``; a policy that adapts itself has one."""
    policy = untuned.policy
    if untuned.name.endswith(SHIPPED):
        return [untuned]
    draft_s = scenario.draft_s(DRAFT_ROWS, scenario.context)

    def trip_s(rows: int) -> float:
        return scenario.trip_s(policy, rows)

    if policy.schedule == "rounds" and policy.topk == 1:
        length = best_chain(trip_s, scenario.acceptance[0], draft_s)
        return [replace(untuned, policy=replace(policy, num_steps=length, max_rows=length + 1))]
    if policy.schedule == "rounds":
        levels, rows = best_tree(trip_s, scenario.acceptance, draft_s, CONTINUOUS.max_rows)
        return [replace(untuned, policy=replace(policy, num_steps=levels, max_rows=rows))]
    if policy.schedule == "pipeinfer":
        sizes = [replace(policy, max_rows=rows) for rows in (2, 3, 4, 6)]
        shares = (1.0, SHIPPED_HEAD_SHARE)
        return [replace(untuned, policy=size, head_share=share) for size in sizes for share in shares]
    return [untuned]


def ideal_speed(scenario: Scenario, seed: int) -> float:
    """Tokens per second of ideal scheduling (see ideal) on the stages that a drafter leaves, for the text of ``seed``:
    at the number of rows that is best for it, never more than continuous may send."""
    text = right_choices(scenario.model(seed), scenario.request(seed).prompt, scenario.point.tokens)

    def speed(rows: int) -> float:
        stage_s, draft_s = scenario.stage_s(CONTINUOUS, rows), scenario.draft_s(DRAFT_ROWS, scenario.context)
        depth = scenario.trip_s(CONTINUOUS, rows) / stage_s
        return ideal(depth, rows, scenario.acceptance, draft_s / stage_s, text) / stage_s

    return max(map(speed, IDEAL_ROWS))
