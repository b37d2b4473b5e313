"""Worlds of launch/transport.py over a simulated MPI: bare traffic, and the machines on real drivers under the
invariants.

A world is drawn from its seed. Tensors are far larger than those of emulated layers, so that some ride with their
message, some follow it eagerly, some wait for their receive; and there are more of them than buffers.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from launch.backoff import Clock
from launch.driver import Driver
from launch.transport import MpiTransport
from pipeinfer.core.addresses import ORCHESTRATOR
from pipeinfer.core.messages import Cancel, Message, Row, Run
from pipeinfer.core.ports import (
    Closed,
    Command,
    Emit,
    Event,
    Finish,
    Output,
    Received,
    Score,
    Started,
    Submitted,
)
from pipeinfer.core.wire import decode, encode
from pipeinfer.placement.roles import rank_of_role
from pipeinfer.runtime.executor import Executor
from pipeinfer.runtime.shards import load_shards
from pipeinfer.sim.bounds import Bounds
from pipeinfer.sim.draft_invariants import Guessed
from pipeinfer.sim.history import History, InvariantBroken
from pipeinfer.sim.invariants import Advice, EndsOnce, Exact, Forced, InOrder
from pipeinfer.sim.random_worlds import random_world
from pipeinfer.sim.replay import Wire
from pipeinfer.sim.slot_invariants import Replicas, Slots
from pipeinfer.sim.world import Answer, Checker, WorldSpec, make_job_spec, make_plan, world_pair
from tests.invariants.simulated_mpi import NAMES, Bell, Library
from tests.invariants.virtual_time import VirtualTime

SCALE = 1e-3
"""Of a pass of the simulator's worlds: a second there is a millisecond here, so that polls are not too many."""
POLL_S = 30e-6
STALL_S = 5.0


def draw_library(rng: random.Random, ranks: int) -> tuple[VirtualTime, Library, dict[bytes, Bell], float]:
    """A library for so many ranks; their bells, and how many rings are lost."""
    time = VirtualTime()
    hosts = tuple(rng.randrange(ranks) for _ in range(ranks)) if rng.random() < 0.3 else (0,) * ranks
    slowest_s = rng.choice((2e-6, 1e-4, 1e-3))
    eager = rng.choice((0, 4096, 40_000, 1 << 30))
    library = Library(time, rng, hosts, (1e-6, slowest_s), eager, rng.random() < 0.7)
    return time, library, {}, rng.choice((0.0, 0.0, 0.2))


# --- bare traffic -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Traffic:
    """Every rank sends every other one ``count`` messages, at most ``each`` of them unanswered; the receiver keeps what
    came for a while, as stages do, reads it and answers with a word of control."""

    seed: int
    ranks: int
    each: int
    count: int
    sizes: tuple[int, ...]

    def check(self) -> int:
        """Run it; how many tensors were read. Raises InvariantBroken for one that is not what was sent."""
        time, library, bells, loss = draw_library(random.Random(self.seed), self.ranks)
        read = [0] * self.ranks

        def rank_program(rank: int) -> None:
            transport = MpiTransport(
                *library.worlds(rank), lambda array: array.view(np.uint8), lambda data, rows: data.view(np.int64),
                self.each, NAMES, Bell(library, rank, bells, loss), time,
            )  # fmt: skip
            read[rank] = Correspondent(self, rank, transport, time).run()
            transport.close()

        time.run([lambda rank=rank: rank_program(rank) for rank in range(self.ranks)])
        return sum(read)

    def size(self, source: int, dest: int, number: int) -> int:
        return self.sizes[(source + dest + number) % len(self.sizes)]


def pattern(source: int, dest: int, number: int, size: int) -> Any:
    """What a tensor of ``size`` numbers holds: nothing that another one does."""
    return np.arange(size, dtype=np.int64) + ((source * 64 + dest) * 4096 + number) * (1 << 32)


class Correspondent:
    """One rank of ``traffic``, over whatever MPI ``transport`` is on."""

    def __init__(self, traffic: Traffic, rank: int, transport: MpiTransport, time: Clock) -> None:
        self._traffic, self._rank, self._transport, self._time = traffic, rank, transport, time
        self._rng = random.Random(traffic.seed * 64 + rank)
        self._others = [other for other in range(traffic.ranks) if other != rank]
        self._sent = dict.fromkeys(self._others, 0)
        self._answered = dict.fromkeys(self._others, 0)
        self._heard = dict.fromkeys(self._others, 0)
        self._kept: deque[tuple[float, Received]] = deque()
        self._read = 0

    def run(self) -> int:
        count = self._traffic.count
        while min((*self._answered.values(), *self._heard.values())) < count or self._kept:
            self._send()
            arrived = self._transport.poll()
            for event in arrived:
                self._take(event)
            while self._kept and self._kept[0][0] <= self._time.monotonic():
                self._look(self._kept.popleft()[1])
            if not arrived:
                self._transport.wait(POLL_S if self._kept else 1e-3)
        return self._read

    def _send(self) -> None:
        for other in self._others:
            number = self._sent[other]
            if number < self._traffic.count and number - self._answered[other] < self._traffic.each:
                size = self._traffic.size(self._rank, other, number)
                message = Message(self._rank, other, Run(number, rows=(Row(number, 0, 0, 0),)), txn=number)
                self._transport.send(other, message, pattern(self._rank, other, number, size) if size else None)
                self._sent[other] += 1

    def _take(self, event: Received) -> None:
        message = event.message
        if message.is_control:
            self._answered[message.source] += 1
            return
        if message.txn != self._heard[message.source]:
            raise InvariantBroken(
                f"L4: rank {self._rank} heard number {message.txn} of rank {message.source} out of order"
            )
        self._heard[message.source] += 1
        self._kept.append((self._time.monotonic() + self._rng.choice((0.0, 0.0, 2e-4)), event))

    def _look(self, event: Received) -> None:
        """Read what was kept, only now: a buffer that was given to another tensor meanwhile holds that one."""
        message = event.message
        number = message.txn
        size = self._traffic.size(message.source, self._rank, number)
        found = np.empty(0, np.int64) if event.payload is None else event.payload
        if not np.array_equal(found, pattern(message.source, self._rank, number, size)):
            raise InvariantBroken(f"L7: rank {self._rank} reads another tensor than the {number}. of {message.source}")
        self._read += size > 0
        self._transport.send(message.source, Message(self._rank, message.source, Cancel()), None)


def random_traffic(seed: int) -> Traffic:
    rng = random.Random(seed)
    ranks = rng.choice((2, 2, 3, 4))
    sizes = rng.choice(((0, 5_000, 6_000), (3, 5_000), (20, 4_000, 8_000, 0)))
    return Traffic(seed, ranks, rng.choice((1, 2, 3)), 20, sizes)


# --- machines, drivers, transport -------------------------------------------------------------------------------


class _Watched:
    """A transport whose messages the checkers see, as in the simulator."""

    def __init__(self, transport: MpiTransport, see: Callable[[Message], None]) -> None:
        self._transport, self._see = transport, see
        self.poll, self.wait, self.close = transport.poll, transport.wait, transport.close

    def send(self, rank: int, message: Message, payload: Any) -> None:
        self._see(decode(encode(message)))
        self._transport.send(rank, message, payload)


class DrivenWorld:
    """The machines of ``spec`` on drivers and transports of ours over a simulated MPI; what checkers know of a World.

    ``factor``: a row of activations is so many words long on the wire."""

    def __init__(self, spec: WorldSpec, factor: int, checkers: tuple[Checker, ...]) -> None:
        self.spec, self.checkers, self._factor = spec, checkers, factor
        job_spec = make_job_spec(spec)
        self.window = job_spec.window
        self.machines = [job_spec.machine(address) for address in job_spec.addresses]
        self.plan = make_plan(spec, spec.model.layers)
        self.home = rank_of_role(self.plan)
        self.hosts: list[Any] = [SimpleNamespace(inbox=deque(), executor=None) for _ in self.plan]
        self.answers: list[Answer] = []
        self.tensors = 0

    @property
    def orchestrator(self) -> Any:
        return self.machines[0]

    def machine(self, address: int) -> Any:
        return next(machine for machine in self.machines if machine.address == address)

    def run(self) -> None:
        ranks = len(self.hosts)
        time, library, bells, loss = draw_library(random.Random(self.spec.seed), ranks)
        time.run([lambda rank=rank: self._play(rank, time, library, bells, loss) for rank in range(ranks)])

    def _play(self, rank: int, time: VirtualTime, library: Library, bells: dict[bytes, Bell], loss: float) -> None:
        transport = MpiTransport(
            *library.worlds(rank), self._pack, self._unpack, self.window, NAMES, Bell(library, rank, bells, loss), time
        )
        driver = Driver(self.home, _Watched(transport, lambda message: self._see(message, time.monotonic())), time)
        machines = [machine for machine in self.machines if self.home[machine.address] == rank]
        shards = load_shards(make_job_spec(self.spec), self.plan[rank], world_pair(self.spec, rank, self.plan[rank]))
        executor = Executor(machines, shards, driver, self._observe, clock=time.monotonic)
        self.hosts[rank].executor = driver.executor = executor
        for address in executor.addresses:
            driver.deliver(address, Started())
        if rank == self.home[ORCHESTRATOR]:
            self._lead(driver)
        driver.run(lambda: executor.is_halted, STALL_S, lambda: f"rank {rank} does not end")
        transport.close()

    def _lead(self, driver: Driver) -> None:
        """All requests at once, or each when the one before is idle; then the end."""
        todo, at_once = deque(enumerate(self.spec.requests)), self.spec.at_once
        while any(answer.stats is None for answer in self.answers) or todo:
            if todo and (at_once or all(answer.stats is not None for answer in self.answers)):
                number, request = todo.popleft()
                self.answers.append(Answer(number))
                driver.deliver(ORCHESTRATOR, Submitted(request, number))
                continue
            driver.run(lambda: bool(driver.outputs), STALL_S, lambda: "; ".join(self.orchestrator.report()))
            self._hear(driver.outputs.popleft()[1])
        driver.deliver(ORCHESTRATOR, Closed())

    def _hear(self, command: Output) -> None:
        answer = self.answers[command.number]
        if isinstance(command, Emit):
            answer.tokens += command.tokens
        elif isinstance(command, Score):
            answer.scores += zip(command.logps, command.tops or [()] * len(command.logps), strict=True)
        elif isinstance(command, Finish):
            answer.reason, answer.fault = command.reason, command.fault
        else:
            answer.stats = command.stats
            for checker in self.checkers:
                checker.on_idle(self, answer, self.spec.requests[command.number])  # type: ignore[arg-type]

    def _see(self, message: Message, now: float) -> None:
        for checker in self.checkers:
            checker.on_message(self, message, now)  # type: ignore[arg-type]

    def _observe(self, address: int, event: Event, now: float, commands: list[Command]) -> None:
        for checker in self.checkers:
            checker.on_event(self, address, event, now, commands)  # type: ignore[arg-type]

    def _pack(self, hidden: Any) -> Any:
        self.tensors += 1
        return np.repeat(hidden, self._factor).view(np.uint8)

    def _unpack(self, data: Any, rows: int) -> Any:
        return data.view(np.uint64)[:: self._factor]


def random_driven_world(seed: int) -> tuple[WorldSpec, int]:
    """A world of the simulator's, made for at least two stages on hosts of their own and nobody who aborts; and the
    length of a row."""
    rng = random.Random(seed)
    spec = random_world(seed)
    stages = max(2, min(spec.stages, 5))
    if not spec.policy.window and rng.random() < 0.5:
        spec = replace(spec, policy=replace(spec.policy, window=rng.randint(1, 2 * stages)))
    spec = replace(
        spec, stages=stages, model=replace(spec.model, layers=stages),
        placement=rng.choice(("spread", "oversubscribed")), aborts=(), closes_s=None, silent_s=None,
        drafters=min(spec.drafters, 2), requests=spec.requests[:2],
        stage_s=tuple(SCALE * pass_s for pass_s in spec.stage_s), draft_s=SCALE * spec.draft_s,
        exchange_s=SCALE * spec.exchange_s,
    )  # fmt: skip
    return spec, rng.choice((1, 1500, 5000))


def check_driven_world(seed: int) -> DrivenWorld:
    """Run the world of ``seed`` under each invariant that is not about the simulator's own time; raises what fails."""
    spec, factor = random_driven_world(seed)
    history = History(spec)
    readers = [invariant(history) for invariant in (Exact, EndsOnce, Slots, Replicas, InOrder, Advice, Forced, Guessed)]
    world = DrivenWorld(spec, factor, (history, *readers, Bounds(spec), Wire()))
    world.run()
    return world
