"""A job: one rank's roles, cast and driven. The head submits requests, the other ranks serve until it closes."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from launch.driver import Driver
from launch.paced_links import PacedLinks
from launch.roles import Plan, Role, count, homes
from pipeinfer import __version__
from pipeinfer.cast import Cast
from pipeinfer.config import Config
from pipeinfer.executor import Executor
from pipeinfer.links import Link
from pipeinfer.orchestrator import Orchestrator
from pipeinfer.ports import (
    Closed,
    Emit,
    Finish,
    Idle,
    Pair,
    Request,
    ShardModel,
    Stalled,
    Started,
    Submitted,
    Tally,
    Transport,
    Withdrawn,
)
from pipeinfer.protocol import FIRST_DRAFTER, ORCHESTRATOR
from pipeinfer.trace import Header, TraceWriter
from speculation.drafter import draft_cells
from speculation.policy import Policy
from speculation.schedule import Placement

if TYPE_CHECKING:
    from launch.mpi import World

PROBE_S = 2.0
"""How long silent roles get to answer before the head gives up on them."""


@dataclass(frozen=True, slots=True)
class News:
    """What the head hears of its request, at ``at_s`` (monotonic seconds): that it began, tokens with their
    log-probabilities, how it ended. ``pulse``: the orchestrator's, for those who watch."""

    at_s: float
    tokens: tuple[int, ...] = ()
    reason: str = ""
    tally: Tally | None = None
    logps: tuple[float, ...] = ()
    pulse: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class RankFacts:
    """One rank as reports show it."""

    rank: int
    host: str
    roles: list[str]
    layers: list[int] | None  # first and last, of its stage
    weight_nbytes: int
    threads: int


class Job:
    """This rank's part of the job that ``config`` and ``plan`` describe; ``world`` is None for a rank that is alone.

    ``link`` paces messages between ranks, and ``placement`` is what is supposed of them, for emulations. ``traffic``:
    messages and bytes that all ranks have sent each other; the head knows it once the job is closed."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        context: int,
        pair: Pair,
        world: World | None = None,
        link: Link | None = None,
        placement: Placement | None = None,
    ) -> None:
        self._config = config
        self._world = world
        rank = world.rank if world else 0
        cast = Cast(
            *count(plan),
            Policy(**config.policy),
            context,
            config.digest(),
            calibrations=config.calibrations,
            placement=placement or (world.placement if world else "alone"),
            draft_contexts=pair.draft_contexts,
        )
        self._trace = _open_trace(config, plan, cast, rank) if config.trace is not None else None
        shards = make_shards(cast, plan[rank], pair)
        self._transport: Transport | None = None
        self.traffic = (0, 0)
        if world is not None:
            from launch.mpi import MpiTransport

            self._transport = MpiTransport(world.comm, pair.pack, pair.unpack, cast.window)
            if link is not None:
                self._transport = PacedLinks(self._transport, link)
        self._driver = Driver(homes(plan), self._transport)
        machines = [cast.machine(role.address) for role in plan[rank]]
        self._orchestrator = next((machine for machine in machines if isinstance(machine, Orchestrator)), None)
        observer = self._trace.write if self._trace else None
        self._executor = Executor(machines, shards, self._driver, observer, clock=time.monotonic)
        self._driver.executor = self._executor
        self.ranks = self._gather(plan[rank], rank, sum(shard.weight_nbytes for shard in shards.values()))
        gc.freeze()  # what is loaded stays: the collector would look at all of it, which takes as long as many a run
        for address in self._executor.addresses:
            self._driver.deliver(address, Started())

    def _gather(self, roles: tuple[Role, ...], rank: int, weight_nbytes: int) -> list[dict[str, Any]]:
        layers = next(([role.layers.start, role.layers.stop - 1] for role in roles if role.layers), None)
        threads = self._world.threads if self._world else 0
        facts = RankFacts(rank, socket.gethostname(), [role.name for role in roles], layers, weight_nbytes, threads)
        return self._world.gather(asdict(facts)) if self._world else [asdict(facts)]

    def submit(self, request: Request) -> Generator[News, None, None]:
        """On the head: serve ``request``; yields its beginning, what happens as it happens, and last the tally.

        Raises StallError, after asking every role what it is doing, if nothing moves for the configured time."""
        assert self._orchestrator is not None
        began = time.monotonic()
        self._driver.deliver(ORCHESTRATOR, Submitted(request))
        reason, is_idle = "", False
        try:
            yield News(began)
            while not is_idle:
                at_s, command = self._hear()
                if isinstance(command, Emit):
                    yield News(at_s, command.tokens, logps=command.logps, pulse=self._orchestrator.pulse)
                elif isinstance(command, Finish):
                    reason = command.reason
                else:
                    is_idle = True
                    yield News(at_s, reason=reason, tally=command.tally)
        except GeneratorExit:  # nobody wants the rest
            self.withdraw()
            while not is_idle:
                is_idle = isinstance(self._hear()[1], Idle)
            raise

    def withdraw(self) -> None:
        """On the head: ask for no more tokens of the request being served; its tally still comes."""
        self._driver.deliver(ORCHESTRATOR, Withdrawn())

    def _hear(self) -> tuple[float, Emit | Finish | Idle]:
        """The next thing that happened, and when; waits for it. What comes after it stays for the next call."""
        driver = self._driver
        driver.run(lambda: bool(driver.news), self._config.timeout_s, self._explain)
        return driver.news.popleft()

    def _explain(self) -> str:
        """Ask every role what it is doing; what they say, or that they are silent."""
        assert self._orchestrator is not None
        self._driver.deliver(ORCHESTRATOR, Stalled())
        until = time.monotonic() + PROBE_S
        self._driver.run(lambda: time.monotonic() > until)
        said = "\n  ".join(self._orchestrator.report())
        waited = f"nothing has moved for {self._config.timeout_s:g} s (--timeout allows more)"
        return f"{waited}; what each role says:\n  {said}"

    def serve(self) -> None:
        """On the other ranks: play until the head closes."""
        self._driver.run(lambda: self._executor.is_halted)
        self._end()

    def close(self) -> None:
        """On the head: let everybody go. Collective with their ``serve``."""
        self._driver.deliver(ORCHESTRATOR, Closed())
        self._driver.run(lambda: self._executor.is_halted, self._config.timeout_s, self._explain)
        self._end()

    def kill(self) -> None:
        """Let go of what this process holds for the job; nothing else outlives it."""
        gc.unfreeze()
        if self._trace is not None:
            self._trace.close()

    def _end(self) -> None:
        if self._transport is not None:
            self._transport.close()
            assert self._world is not None
            sent = self._world.gather({"messages": self._transport.messages, "nbytes": self._transport.nbytes})
            self.traffic = (sum(rank["messages"] for rank in sent), sum(rank["nbytes"] for rank in sent))
        self.kill()


def make_shards(cast: Cast, roles: tuple[Role, ...], pair: Pair) -> dict[int, ShardModel]:
    """The models of ``roles``, by address."""
    shards: dict[int, ShardModel] = {}
    for role in roles:
        if role.layers is not None:
            shards[role.address] = pair.stage(role.layers, sum(cast.cells))
        elif role.address != ORCHESTRATOR:
            shards[role.address] = pair.draft(role.address - FIRST_DRAFTER, draft_cells(cast.policy, cast.context))
    return shards


def _open_trace(config: Config, plan: Plan, cast: Cast, rank: int) -> TraceWriter:
    layers = next(([role.layers.start, role.layers.stop] for role in plan[rank] if role.layers), None)
    header = Header(
        rank,
        len(plan),
        [role.address for role in plan[rank]],
        cast.numbers(),
        asdict(config),
        layers,
        socket.gethostname(),
        __version__,
        time.time() - time.monotonic(),
    )
    return TraceWriter(config.trace or "", header)
