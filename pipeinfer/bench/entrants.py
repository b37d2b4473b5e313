"""Entrants: the policies of a suite as they start at a point; where the suite says so, rivals at their best sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeinfer.bench.ideal import best_chain, best_tree, ideal
from pipeinfer.bench.scene import DRAFT_ROWS, Scene
from pipeinfer.costs.paths import BENCHMARKS
from speculation.schedules.policy import CONTINUOUS, Policy, read_policy
from stages.models.emulated import right_choices

SHIPPED_HEAD_SHARE = 2 / 3
"""Layers of PipeInfer's first stage, in those of another, in its script for eight nodes."""
SHIPPED = "-shipped"
"""Ends the name of a rival that stays as its authors ship it where others are tuned."""
IDEAL_ROWS = [1 << power for power in range(CONTINUOUS.rows.bit_length())]


@dataclass(frozen=True, slots=True)
class Entrant:
    """A policy under the name it has in the suite, read from ``source`` with ``changes`` (see read_policy).
    ``head_share``: see Scene.shares."""

    name: str
    policy: Policy
    source: str
    changes: tuple[str, ...] = ()
    head_share: float = 1.0

    def settings(self) -> dict[str, Any]:
        """What was changed for the point, by tuning or by its own words."""
        read = read_policy(self.source).settings()
        changed = {knob: value for knob, value in self.policy.settings().items() if value != read[knob]}
        return changed | ({"head_share": round(self.head_share, 3)} if self.head_share != 1.0 else {})

    def words(self) -> dict[str, Any]:
        """All of it, for other ranks."""
        return asdict(self)

    @classmethod
    def of(cls, words: dict[str, Any]) -> Entrant:
        """What ``words`` made, JSON in between."""
        return cls(**words | {"policy": Policy(**words["policy"]), "changes": tuple(words["changes"])})


def entrant(name: str, changes: Sequence[str] = ()) -> Entrant:
    """The entrant ``name``: a built-in policy, one of benchmarks/baselines, or a file, with SHIPPED or without. Raises
    UserError."""
    plain_name = name.removesuffix(SHIPPED)
    path = BENCHMARKS / "baselines" / f"{plain_name}.toml"
    source = str(path) if path.is_file() else plain_name
    policy = read_policy(source)
    if policy.speculate and changes:
        policy = read_policy(source, changes)
    changes = tuple(changes) if policy.speculate else ()
    head_share = SHIPPED_HEAD_SHARE if plain_name != name and policy.schedule == "frontier" else 1.0
    return Entrant(Path(name).stem, policy, source, changes, head_share)


def variants(untuned: Entrant, scene: Scene) -> list[Entrant]:
    """The sizes among which the best one of a rival for ``scene`` is; whoever tunes itself has one."""
    policy = untuned.policy
    if untuned.name.endswith(SHIPPED):
        return [untuned]
    draft_s = scene.draft_s(DRAFT_ROWS, scene.context)

    def trip_s(rows: int) -> float:
        return scene.trip_s(policy, rows)

    if policy.schedule == "rounds" and policy.width == 1:
        length = best_chain(trip_s, scene.acceptance[0], draft_s)
        return [replace(untuned, policy=replace(policy, levels=length, rows=length + 1))]
    if policy.schedule == "rounds":
        levels, rows = best_tree(trip_s, scene.acceptance, draft_s, CONTINUOUS.rows)
        return [replace(untuned, policy=replace(policy, levels=levels, rows=rows))]
    if policy.schedule == "frontier":
        sizes = [replace(policy, rows=rows) for rows in (2, 3, 4, 6)]
        shares = (1.0, SHIPPED_HEAD_SHARE)
        return [replace(untuned, policy=size, head_share=share) for size in sizes for share in shares]
    return [untuned]


def ideal_speed(scene: Scene, seed: int) -> float:
    """Tokens per second of ideal scheduling (see ideal) on the stages that a drafter leaves, for the text of ``seed``:
    at the number of rows that is best for it, never more than continuous may send."""
    text = right_choices(scene.model(seed), scene.request(seed).prompt, scene.point.tokens)

    def speed(rows: int) -> float:
        stage_s, draft_s = scene.stage_s(CONTINUOUS, rows), scene.draft_s(DRAFT_ROWS, scene.context)
        depth = scene.trip_s(CONTINUOUS, rows) / stage_s
        return ideal(depth, rows, scene.acceptance, draft_s / stage_s, text) / stage_s

    return max(map(speed, IDEAL_ROWS))
