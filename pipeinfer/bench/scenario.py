"""Scenarios: what a point means for emulated models. Layers, shares, paces and links, alike for simulation and
emulation.

Comparisons are at equal ranks. A policy that drafts leaves rank 0 to the orchestrator and the drafter; plain decoding
uses that rank as a further stage, of fewer layers each. Where ``tp`` ranks share a stage, that rank is too few for one
more, and leads only.

A group of N ranks computes a layer in

    layer(r, N) = overhead + (layer(r) - overhead) / (N efficiency) + 2 exchange(r)
    exchange(r) = EXCHANGE_S + r (N - 1) bytes / EXCHANGE_BANDWIDTH

with r rows, of so many bytes of activations each, and the overhead of a layer that the hardware describes. The
efficiency is the point's; ranks that share one memory have 1 / N at worst.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeinfer.bench.suite import ROW_COUNTS, Point
from pipeinfer.core.config import AUTO
from pipeinfer.core.errors import refuse
from pipeinfer.core.links import Link
from pipeinfer.core.ports import Request
from pipeinfer.placement.roles import split_layers
from pipeinfer.runtime.pass_times import CONTEXT, ROWS
from speculation.schedules.cost_curve import Priors
from speculation.schedules.policy import CONTINUOUS, PLAIN, Policy
from stages.models.emulated import EmulatedSpec, Pace, spread

if TYPE_CHECKING:
    from pipeinfer.costs.roofline import Costs

LAYERS = 80
"""Approximate number of layers of a point without a hardware. Cancels arrive between layers; each stage has three or
more."""
DRAFT_ROWS = 8
"""Leaves that a pass of the draft has, for closed forms."""
PROMPT_TOKENS = 16
"""Where a point does not say."""
LOCAL_LINK = Link(delay_s=6e-4, bandwidth=5e9)
"""Between ranks of one host, where a point has no hardware: what a stage adds to a token of plain decoding where 9 to
33 ranks share two cores. Most of this time is Python with cold caches."""
EXCHANGE_S = 1e-5
"""Seconds of an exchange of nothing, between the ranks of a host: assumed, some trips of a cache line and threads that
wake."""
EXCHANGE_BANDWIDTH = 1e10
"""Bytes per second at which a rank reads what another has written: assumed, as between two sockets."""
LATE = 0.1
"""By up to this share of a layer each rank of a group is late: assumed."""


@dataclass(frozen=True, slots=True)
class Flat:
    """A pace that is the same for any number of rows."""

    seconds: float

    def __call__(self, rows: int, context: int) -> float:
        """See Pace."""
        return self.seconds


@dataclass(frozen=True, slots=True)
class Measured:
    """A pace through measured ``costs`` of ROW_COUNTS rows, straight on beyond the last one; one row takes
    ``seconds``."""

    seconds: float
    costs: tuple[float, ...]

    def __call__(self, rows: int, context: int) -> float:
        """See Pace."""
        high = next((index for index, count in enumerate(ROW_COUNTS) if rows <= count), len(ROW_COUNTS) - 1) or 1
        few, many = ROW_COUNTS[high - 1 : high + 1]
        low_s, high_s = self.costs[high - 1 : high + 1]
        return self.seconds / self.costs[0] * (low_s + (high_s - low_s) * (rows - few) / (many - few))


@dataclass(frozen=True, slots=True)
class Roofline:
    """The pace of one target layer on a hardware; the output head's time is spread over all ``layers``."""

    costs: Costs
    layers: int

    def __call__(self, rows: int, context: int) -> float:
        """See Pace."""
        return self.costs.layer_s(rows, context) + self.costs.head_s(rows) / self.layers


@dataclass(frozen=True, slots=True)
class Shared:
    """The pace of a layer that ``tp`` ranks share, where one alone has the pace ``alone``. ``overhead_s``: seconds that
    are not divided; ``row_nbytes``: bytes of a row's activations."""

    alone: Pace
    tp: int
    efficiency: float
    overhead_s: float = 0.0
    row_nbytes: int = 0

    def __call__(self, rows: int, context: int) -> float:
        """See Pace."""
        shared_s = (self.alone(rows, context) - self.overhead_s) / (self.tp * self.efficiency)
        exchange_s = EXCHANGE_S + rows * (self.tp - 1) * self.row_nbytes / EXCHANGE_BANDWIDTH
        return self.overhead_s + shared_s + 2 * exchange_s


@dataclass(frozen=True, slots=True)
class Scenario:
    """A point with its numbers. ``layer_s``: a target layer, of a whole group; ``draft_s``: a pass of the draft; both
    in seconds."""

    point: Point
    acceptance: tuple[float, ...]
    layers: int
    layer_s: Pace
    draft_s: Pace
    link: Link
    costs: Costs | None = None

    @property
    def context(self) -> int:
        """KV slots that a row attends to half way through the answer, for closed forms."""
        return self.prompt_tokens + self.point.tokens // 2

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return self.point.prompt_tokens or PROMPT_TOKENS

    def stages(self, policy: Policy) -> int:
        """Stages of ``policy``: all ranks but a drafter's, or their groups. Of many requests all policies have the same
        stages."""
        return max(1, (self.point.ranks - (policy.speculate or self.point.requests > 0)) // self.point.tp)

    def is_rank_0_shared(self, policy: Policy) -> bool:
        """Whether rank 0 has a role beside the orchestrator."""
        return policy.speculate or (self.point.tp == 1 and not self.point.requests)

    def shares(self, policy: Policy, head_share: float = 1.0) -> tuple[int, ...]:
        """Layers of each stage, as even as can be; the first one has ``head_share`` of what another has."""
        sizes = [head_share, *[1.0] * (self.stages(policy) - 1)]
        return tuple(len(share) for share in split_layers(self.layers, sizes, round))

    def stage_s(self, policy: Policy, rows: int) -> float:
        """Seconds of a pass of the largest stage."""
        return max(self.shares(policy)) * self.layer_s(rows, self.context)

    def trip_s(self, policy: Policy, rows: int) -> float:
        """Seconds from a run's launch to its result where nothing else is under way."""
        hop_s = self.link.delay_s + rows * self.link.row_nbytes / self.link.bandwidth
        return self.layers * self.layer_s(rows, self.context) + (self.stages(policy) + 1) * hop_s

    def priors(self, policy: Policy) -> Priors:
        """What ranks measure of ``policy``'s passes after loading: short contexts, and no links."""
        layers = max(self.shares(policy))
        times = [(rows, self.layer_s(rows, CONTEXT + rows), self.draft_s(rows, CONTEXT + rows)) for rows in ROWS]
        return Priors(
            tuple((rows, layers * layer_s) for rows, layer_s, _ in times),
            tuple((rows, self.layers * layer_s) for rows, layer_s, _ in times),
            tuple((rows, draft_s) for rows, _, draft_s in times) if policy.speculate else (),
        )

    @property
    def ceiling(self) -> float:
        """Tokens per second of plain decoding, at most: all layers one after the other, and the links if they are
        described."""
        layers_s = self.layers * self.layer_s(1, self.context)
        return 1 / (self.trip_s(PLAIN, 1) if self.point.hardware else layers_s)

    def facts(self, policy: Policy) -> dict[str, Any]:
        """What a row says of the scenario."""
        point = self.point
        stages = self.stages(policy)
        found = {
            "ranks": point.ranks,
            "stages": stages,
            "tp": point.tp if point.tp > 1 else None,
            "efficiency": point.efficiency if point.tp > 1 else None,
            "acceptance": {"top1": self.acceptance[0], "ranks": list(self.acceptance)},
            "draft_time": self.draft_s(DRAFT_ROWS, self.context) / self.stage_s(CONTINUOUS, DRAFT_ROWS),
            "hardware": point.hardware or None,
            "target": point.target or None,
            "draft": point.draft or None,
            "dtype": "fp32" if point.dtype == AUTO else point.dtype,
            "prompt_tokens": self.prompt_tokens,
            "set": list(point.set),
            "claims": list(point.claims),
            "burst": list(point.burst),
            "requests": point.requests or None,
            "arrivals": point.arrivals if point.requests else None,
            "row_costs": list(point.row_costs) or None,
            "bytes_per_rank": None,
            "ceiling_tokens_per_s": self.ceiling,
        }
        if self.costs is not None:
            slots = self.prompt_tokens + point.tokens + policy.most_guesses(stages)
            found["bytes_per_rank"] = self.costs.stage_nbytes(max(self.shares(policy)), slots, ends=1) // point.tp
        return found

    def model(self, seed: int) -> EmulatedSpec:
        """The emulated pair."""
        burst = (int(self.point.burst[0]), self.point.burst[1]) if self.point.burst else (1, 0.0)
        return EmulatedSpec(self.layers, 5000, seed, self.acceptance, self.point.claims or None, burst)

    def request(self, seed: int) -> Request:
        """A prompt of its own for each seed."""
        prompt = tuple((7919 * (seed + 1) + 31 * index) % 5000 for index in range(self.prompt_tokens))
        return Request(prompt, self.point.tokens)


def scenario(point: Point) -> Scenario:
    """What ``point`` means. Raises UserError where it says too little."""
    if point.ranks < 2:
        refuse(f"a point with {point.ranks} ranks", "say `stages` (at least 1) or `ranks` (at least 2) in the suite")
    if (point.ranks - 1) % point.tp:
        refuse(f"a point with {point.ranks} ranks and tp = {point.tp}", "use a rank more than the groups have")
    acceptance = point.acceptance or spread(point.top1)
    if not point.hardware:
        stages = point.ranks - 1
        each = max(3, round(LAYERS / stages))
        layer_s, draft_s = 1e-3 * point.stage_ms / each, 1e-3 * point.stage_ms * point.draft_time
        layer: Pace = Flat(layer_s)
        draft: Pace = Flat(draft_s)
        if point.row_costs:
            layer, draft = Measured(layer_s, point.row_costs), Measured(draft_s, point.row_costs)
        return Scenario(point, acceptance, each * stages, _shared(point, layer), draft, LOCAL_LINK)
    if not point.target or not point.draft:
        refuse(f"a point with hardware {point.hardware} but no models", "name `target` and `draft` shapes in the suite")
    from pipeinfer.costs.hardware import read_hardware
    from pipeinfer.costs.roofline import Costs
    from pipeinfer.costs.shapes import read_shape

    hardware, target = read_hardware(point.hardware), read_shape(point.target)
    costs = Costs(hardware, target, read_shape(point.draft))
    if target.layers < point.ranks:
        refuse(f"{point.ranks} ranks for the {target.layers} layers of {point.target}", "use fewer ranks")
    row_nbytes = costs.activation_nbytes(1)
    overhead_s = hardware.arithmetic[target.dtype].overhead_s
    pace = _shared(point, Roofline(costs, target.layers), overhead_s, row_nbytes)
    link = replace(hardware.link, row_nbytes=row_nbytes)
    return Scenario(point, acceptance, target.layers, pace, costs.draft_s, link, costs)


def _shared(point: Point, alone: Pace, overhead_s: float = 0.0, row_nbytes: int = 0) -> Pace:
    return Shared(alone, point.tp, point.efficiency, overhead_s, row_nbytes) if point.tp > 1 else alone
