"""The machines of a job, from its numbers alone: every rank, every simulated world and every replay builds the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeinfer.core.addresses import FIRST_DRAFTER, ORCHESTRATOR, drafter_address, stage_address
from pipeinfer.core.ports import Machine
from pipeinfer.orchestrator.machine import Orchestrator
from speculation.drafter.machine import Drafter
from speculation.schedules.cost_curve import Costs, Priors
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import PLACEMENTS, Placement
from stages.stage.machine import Stage

MOST_SHARES = 8
"""Slots for guesses in flight are those of so many requests that are decoded alone, at most: the more requests, the
fewer guesses of each are worth a row."""
COSTS = ("row_costs", "trip_costs", "draft_costs")


@dataclass(frozen=True, slots=True)
class JobSpec:
    """Who plays: ``stages`` stages and ``drafters`` drafters, by ``policy``, for requests of up to ``context`` tokens.

    ``digest``: what ranks compare in Hello. ``guess_slots``: slots for guesses in flight, if fewer than the policy
    wants. ``calibrations``: what is known of each source's probabilities.
    ``placement``: what processors the roles have. ``draft_contexts``: of each drafter the positions that its model was
    made for, 0 for any number; empty if none has a limit. ``max_num_seqs``: requests that are decoded at once.
    ``kv_slots``: slots of a stage for accepted tokens of all of them; 0: enough for that many whole contexts.
    ``keeps_prefixes``: whether what a request has computed is kept for others that begin with the same tokens.
    ``row_costs``, ``trip_costs``, ``draft_costs``: what passes took when the
    models were loaded (see Priors); empty if nothing was measured."""

    stages: int
    drafters: int
    policy: Policy
    context: int
    digest: int = 0
    guess_slots: int | None = None
    calibrations: dict[str, dict[str, Any]] = field(default_factory=dict)
    placement: Placement = "spread"
    draft_contexts: tuple[int, ...] = ()
    max_num_seqs: int = 1
    kv_slots: int = 0
    keeps_prefixes: bool = False
    row_costs: Costs = ()
    trip_costs: Costs = ()
    draft_costs: Costs = ()

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be {', '.join(PLACEMENTS)}, not {self.placement!r}")

    @classmethod
    def of(cls, numbers: Mapping[str, Any]) -> JobSpec:
        """What ``numbers`` made, JSON in between or not. Raises TypeError or ValueError for what they cannot be."""
        contexts = tuple(numbers.get("draft_contexts", ()))
        costs = {name: tuple((int(rows), float(seconds)) for rows, seconds in numbers.get(name, ())) for name in COSTS}
        return cls(**{**numbers, "policy": Policy(**numbers["policy"]), "draft_contexts": contexts, **costs})

    def numbers(self) -> dict[str, Any]:
        """All of it, in words that JSON knows."""
        return asdict(self)

    @property
    def addresses(self) -> list[int]:
        """The orchestrator's, the stages' in order, the drafters'."""
        stages = [stage_address(index) for index in range(self.stages)]
        return [ORCHESTRATOR, *stages, *(drafter_address(index) for index in range(self.drafters))]

    @property
    def window(self) -> int:
        """Most runs in flight."""
        return self.policy.most_runs(self.stages)

    @property
    def slots(self) -> tuple[int, int]:
        """Slots of every stage: for accepted tokens, and for guesses in flight."""
        guesses = min(self.max_num_seqs, MOST_SHARES) * self.policy.most_guesses(self.stages)
        accepted = max(self.context, self.kv_slots) if self.kv_slots else self.max_num_seqs * self.context
        return accepted, guesses if self.guess_slots is None else min(guesses, self.guess_slots)

    def machine(self, address: int) -> Machine:
        """The brain of the role at ``address``, as it is before anything has happened."""
        if address == ORCHESTRATOR:
            return Orchestrator(
                self.stages,
                self.drafters,
                self.policy,
                self.context,
                self.digest,
                self.slots,
                self.calibrations,
                self.placement,
                Priors(self.row_costs, self.trip_costs, self.draft_costs),
                self.max_num_seqs,
                self.keeps_prefixes,
            )
        if address >= FIRST_DRAFTER:
            index = address - FIRST_DRAFTER
            positions = self.draft_contexts[index] if index < len(self.draft_contexts) else 0
            numbers = (self.context, self.digest, positions, self.draft_costs, self.max_num_seqs, self.kv_slots)
            return Drafter(address, self.policy, *numbers)
        # Where one stage is all, its result is the best there is to know for the next run.
        result_first = self.policy.schedule == "continuous" and self.stages == 1
        credits_early = self.policy.schedule != "pipeinfer" and not result_first
        return Stage(address, self.stages, sum(self.slots), self.window, self.digest, credits_early, result_first)
