"""A world: hosts with their executors, joined by a simulated network, under one virtual clock.

A host does one thing at a time, as a real rank does: messages that arrive during a layer wait for its end. Everything
is decided by the seed, so a failing world is its own reproduction.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from pipeinfer.core.addresses import FIRST_DRAFTER, ORCHESTRATOR
from pipeinfer.core.errors import StallError
from pipeinfer.core.links import Link
from pipeinfer.core.messages import Message, TopToken
from pipeinfer.core.ports import (
    Aborted,
    Closed,
    Command,
    Emit,
    Event,
    Finish,
    Machine,
    Output,
    Pair,
    Received,
    Request,
    RequestStats,
    Score,
    Send,
    ShardModel,
    Started,
    Submitted,
)
from pipeinfer.core.slots import batch_in_order
from pipeinfer.core.wire import decode, encode
from pipeinfer.orchestrator.machine import Orchestrator
from pipeinfer.placement.roles import Plan, Role, place, rank_of_role, split_layers
from pipeinfer.runtime.executor import Executor
from pipeinfer.runtime.job_spec import JobSpec
from pipeinfer.runtime.shards import load_shards
from pipeinfer.sim.network import Network
from speculation.schedules.cost_curve import NO_PRIORS, Priors
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import Placement
from stages.models.emulated import EmulatedPair, EmulatedShard, EmulatedSpec, Pace, finish, per_layer
from stages.models.emulated_group import EmulatedGroup
from stages.models.group_shard import GroupShard


@dataclass(frozen=True, slots=True)
class WorldSpec:
    """Everything about a world. ``stage_s`` and ``draft_s``: seconds of one pass of a stage and of the draft model;
    or, where passes do not cost the same always, ``paces`` of one target layer and of a draft pass. Hosts are those of
    pipeinfer/placement/roles.py: one where ``placement`` is "alone", else the orchestrator and the first drafter share
    theirs, if ``drafter_beside_orchestrator``. A host with a stage may stand for the leader of a group of ``tp`` ranks;
    the others have no roles."""

    seed: int
    policy: Policy
    stages: int
    requests: tuple[Request, ...]
    model: EmulatedSpec = field(default_factory=EmulatedSpec)
    stage_s: tuple[float, ...] = (1.0,)  # cycled over the stages
    drafters: int = 1
    draft_s: float = 0.1
    row_cost: float = 0.0  # what each further row adds to a pass, as a fraction of the pass
    paces: tuple[Pace, Pace] | None = None
    shares: tuple[int, ...] = ()  # layers of each stage; by default they are dealt out evenly
    link: Link = field(default_factory=Link)
    context: int = 256
    placement: Placement = "spread"
    drafter_beside_orchestrator: bool = True
    draft_contexts: tuple[int, ...] = ()  # positions that each draft was made for, 0 for any number
    guess_slots: int | None = None  # slots for guesses in flight, if not what the policy wants
    at_once: bool = False  # all requests are submitted at the beginning, not each when the one before is idle
    aborts: tuple[tuple[float, int], ...] = ()  # when the user aborts which request, counted from 0
    closes_s: float | None = None  # when the user closes, whatever waits or is being served
    silent_s: float | None = None  # from when on drafters that have a host of their own send no more messages
    priors: Priors = NO_PRIORS  # what passes are said to take
    tp: int = 1  # ranks of a group: they share a stage, and the drafts that its leader hosts
    late: float = 0.0  # by up to this share of a layer each rank of a group may be late
    exchange_s: float = 0.0  # what a group spends on each of the two exchanges of a layer
    arrivals: tuple[float, ...] = ()  # when each request is submitted; empty: see at_once
    max_num_seqs: int = 1  # requests that are decoded at once
    kv_slots: int | None = None  # slots of all their accepted tokens; by default each has a whole context
    keeps_prefixes: bool = False  # see JobSpec


@dataclass(slots=True)
class Answer:
    """What the user received of request ``number``, counted from 0; times in virtual seconds. ``scores``: of the tokens
    of its prompt, log-probabilities and the most probable ones in their place."""

    number: int = 0
    tokens: list[int] = field(default_factory=list)
    emitted_at: list[tuple[float, int]] = field(default_factory=list)
    submitted_at: float = 0.0
    reason: str = ""
    fault: int | None = None
    stats: RequestStats | None = None
    scores: list[tuple[float, tuple[TopToken, ...]]] = field(default_factory=list)


class Checker:
    """Sees everything that happens in a world; the checkers of invariants derive from it."""

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """A role has handled an event."""

    def on_message(self, world: World, message: Message, now: float) -> None:
        """A message has been put on the network."""

    def on_idle(self, world: World, answer: Answer, request: Request) -> None:
        """A request has come to its end and nothing of it is in flight."""


class Host:
    """One simulated rank: its executor, and the messages that wait for the end of a layer."""

    def __init__(self, world: World, index: int, machines: list[Machine], shards: dict[int, ShardModel]) -> None:
        self.index = index
        self.inbox: deque[Received] = deque()
        self.stepping = False
        self._alarm: float | None = None  # the last one put on the agenda
        self._world = world
        self.executor = Executor(machines, shards, self, self._observe)

    def _observe(self, address: int, event: Event, now: float, commands: list[Command]) -> None:
        self._world.events += 1
        for checker in self._world.checkers:
            checker.on_event(self._world, address, event, now, commands)

    def send(self, command: Send, now: float) -> None:
        """Outlet: put a message on the network, through the wire format."""
        world = self._world
        message = decode(encode(command.message))
        for checker in world.checkers:
            checker.on_message(world, message, now)
        if world.spec.silent_s is not None and message.source >= FIRST_DRAFTER and now >= world.spec.silent_s:
            return
        dest = world.hosts[world.home[message.dest]]
        for arrival in world.network.arrivals(self.index, dest.index, message, command.payload, now):
            world.at(arrival, lambda when: dest.arrive(Received(message, command.payload), when))

    def tell(self, command: Output, now: float) -> None:
        """Outlet: report to the user."""
        self._world.receive(command, now)

    def arrive(self, event: Received, now: float) -> None:
        """A message is here; it is handled now, or at the end of the layer that is being computed."""
        if self.stepping:
            self.inbox.append(event)
        else:
            self.executor.deliver(event.message.dest, event, now)
            self.run(now)

    def run(self, now: float) -> None:
        """Handle what waits, then compute the next layer."""
        self.stepping = False
        while self.inbox:
            event = self.inbox.popleft()
            self.executor.deliver(event.message.dest, event, now)
        self.executor.ring(now)
        rest = self.executor.step(now)
        while rest == 0.0:
            rest = self.executor.step(now)
        if rest is not None:
            self.stepping = True
            self._world.at(now + rest, self.run)
        if self.executor.alarm not in (None, self._alarm):
            self._alarm = self.executor.alarm
            self._world.at(max(now, self._alarm or 0.0), self.tick)

    def tick(self, now: float) -> None:
        """A role may want to be woken; in the middle of a layer it waits for its end."""
        if not self.stepping:
            self.run(now)


class World:
    """Runs the requests of ``spec``; ``checkers`` watch. ``pair``: the models, by default emulated ones. ``network``:
    makes the network of a link and a random generator."""

    def __init__(
        self,
        spec: WorldSpec,
        checkers: tuple[Checker, ...] = (),
        pair: Pair | None = None,
        network: Callable[[Link, random.Random], Network] = Network,
    ) -> None:
        self.spec = spec
        self.checkers = checkers
        self.now = 0.0
        self.events = 0
        self.answers: list[Answer] = []
        self.network = network(spec.link, random.Random(spec.seed))
        self._agenda: list[tuple[float, int, Callable[[float], None]]] = []
        self._serial = 0
        self._todo = deque(spec.requests)
        self.machines = make_machines(spec)
        self.plan = make_plan(spec, pair.layers if pair is not None else spec.model.layers)
        self.home = rank_of_role(self.plan)
        self.hosts: list[Host] = []
        for index, roles in enumerate(self.plan):
            machines = [machine for machine in self.machines if self.home[machine.address] == index]
            shards = load_shards(make_job_spec(spec), roles, pair or world_pair(spec, index, roles))
            warm_up(shard for shard in shards.values() if isinstance(shard, GroupShard))
            self.hosts.append(Host(self, index, machines, shards))

    @property
    def orchestrator(self) -> Orchestrator:
        """The machine that leads."""
        machine = self.machines[0]
        assert isinstance(machine, Orchestrator)
        return machine

    def at(self, when: float, action: Callable[[float], None]) -> None:
        """Have ``action`` called at virtual time ``when``."""
        self._serial += 1
        heapq.heappush(self._agenda, (when, self._serial, action))

    def run(self, most_events: int = 1_000_000) -> list[Answer]:
        """Run to the end of the last request; raises StallError where nothing is left to happen before it (L5)."""
        for host in self.hosts:
            for address in host.executor.addresses:
                host.executor.deliver(address, Started(), 0.0)
        for when in self.spec.arrivals:
            self.at(when, self._submit)
        while not self.spec.arrivals and self._todo:
            self._submit(0.0)
            if not self.spec.at_once:
                break
        for when, number in self.spec.aborts:
            self.at(when, partial(self._to_orchestrator, Aborted(number)))
        if self.spec.closes_s is not None:
            self.at(self.spec.closes_s, self._close)
        while self._agenda:
            self.now, _, action = heapq.heappop(self._agenda)
            action(self.now)
            if self.events > most_events:
                raise StallError(f"more than {most_events} events")
        if not all(host.executor.is_halted for host in self.hosts):
            raise StallError("; ".join(self.orchestrator.report()))
        return self.answers

    def _submit(self, now: float) -> None:
        if self._todo:
            number = len(self.answers)
            self.answers.append(Answer(number, submitted_at=now))
            self._to_orchestrator(Submitted(self._todo.popleft(), number), now)

    def _go_on(self, now: float) -> None:
        """A request is idle: the next one is submitted, if that is how they come, or it was the last one."""
        if self._todo and not self.spec.arrivals:
            self._submit(now)
        elif not self._todo and all(answer.stats is not None for answer in self.answers):
            self._to_orchestrator(Closed(), now)

    def _close(self, now: float) -> None:
        self._todo.clear()
        self._to_orchestrator(Closed(), now)

    def _to_orchestrator(self, event: Event, now: float) -> None:
        """Give the orchestrator an event of the user unless it has halted."""
        head = self.hosts[0]
        if head.executor.is_halted:
            return
        head.executor.deliver(ORCHESTRATOR, event, now)
        if not head.stepping:
            head.run(now)

    def machine(self, address: int) -> Machine:
        """The role at ``address``."""
        return next(machine for machine in self.machines if machine.address == address)

    def receive(self, command: Output, now: float) -> None:
        """Take what the orchestrator reports to the user."""
        answer = self.answers[command.number]
        if isinstance(command, Emit):
            answer.tokens += command.tokens
            answer.emitted_at.append((now, len(command.tokens)))
        elif isinstance(command, Score):
            answer.scores += zip(command.logps, command.tops or [()] * len(command.logps), strict=True)
        elif isinstance(command, Finish):
            answer.reason, answer.fault = command.reason, command.fault
        else:
            answer.stats = command.stats
            request = self.spec.requests[command.number]
            for checker in self.checkers:
                checker.on_idle(self, answer, request)
            self.at(now, self._go_on)


def make_job_spec(spec: WorldSpec) -> JobSpec:
    """The JobSpec of the world of ``spec``; drafters only if the policy speculates."""
    drafters = spec.drafters if spec.policy.speculate else 0
    numbers = (spec.stages, drafters, spec.policy, spec.context)
    limits = spec.draft_contexts
    return JobSpec(
        *numbers,
        guess_slots=spec.guess_slots,
        placement=spec.placement,
        draft_contexts=limits,
        row_costs=spec.priors.rows,
        trip_costs=spec.priors.trips,
        draft_costs=spec.priors.drafts,
        max_num_seqs=spec.max_num_seqs,
        kv_slots=spec.kv_slots or 0,
        keeps_prefixes=spec.keeps_prefixes,
    )


def make_machines(spec: WorldSpec) -> list[Machine]:
    """The orchestrator, the stages in order, the drafters."""
    job_spec = make_job_spec(spec)
    return [job_spec.machine(address) for address in job_spec.addresses]


def make_plan(spec: WorldSpec, layers: int) -> Plan:
    """The hosts of the world of ``spec`` and their roles, where the target has ``layers`` layers."""
    shares = split_layers(layers, spec.shares or [1] * spec.stages)
    drafters = make_job_spec(spec).drafters
    return place(shares, drafters, spec.placement == "alone", spec.drafter_beside_orchestrator)


class WorldPair(EmulatedPair):
    """The emulated models of ``spec``, shared by the ranks of ``group``. Every stage has its own pace."""

    def __init__(self, spec: WorldSpec, group: EmulatedGroup | None = None) -> None:
        make = EmulatedShard if group is None else group.shard
        self._exchanges_s = 0.0 if group is None else 2 * spec.exchange_s  # of a layer
        draft_s = _pace(spec.draft_s, spec.row_cost, self._exchanges_s * spec.model.layers)
        super().__init__(spec.model, *(spec.paces or (_pace(0.0, spec.row_cost), draft_s)), make, make)
        self._paces: dict[range, Pace] = {}  # of one layer, by the layers of a stage
        for index, layers in enumerate(split_layers(spec.model.layers, spec.shares or [1] * spec.stages)):
            stage_s = _pace(spec.stage_s[index % len(spec.stage_s)], spec.row_cost, self._exchanges_s * len(layers))
            self._paces[layers] = spec.paces[0] if spec.paces else per_layer(stage_s, len(layers))

    def stage(self, layers: range, capacity: int) -> ShardModel:
        """See Pair."""
        return self._make_stage(self._spec, layers, capacity, self._paces[layers])


def world_pair(spec: WorldSpec, host: int, roles: Sequence[Role]) -> WorldPair:
    """The emulated models of ``spec`` for one of its hosts, whose group shares them if it has a stage."""
    if spec.tp == 1 or all(role.layers is None for role in roles):
        return WorldPair(spec)
    return WorldPair(spec, EmulatedGroup(spec.tp, spec.late, spec.seed << 8 ^ host))


def warm_up(shards: Iterable[GroupShard]) -> None:
    """What ranks do with their shards after loading, in short: a pass, a choice, and all slots as they were."""
    for shard in shards:
        batch = batch_in_order([0, 0])
        shard.sample(finish(shard.forward(batch, None)), [1], 1)
        shard.clear(len(batch.slots))


def _pace(pass_s: float, row_cost: float, more_s: float = 0.0) -> Pace:
    return lambda rows, context: pass_s * (1.0 + row_cost * (rows - 1)) + more_s
