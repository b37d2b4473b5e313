"""A job: one rank's roles, created and driven. head.py leads on rank 0; the other ranks serve until rank 0 closes."""

from __future__ import annotations

import socket
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from launch.backoff import LONGEST_S, Backoff
from launch.collector import paused
from launch.compute_threads import start_threads
from launch.cores import alone
from launch.driver import Driver
from launch.failure import write
from launch.grammars import grammars_of
from launch.paced_links import PacedLinks
from launch.pass_cache import PassCache, model_digest
from launch.start_costs import agreed, are_of_use, measured
from pipeinfer.core.addresses import ORCHESTRATOR
from pipeinfer.core.config import Config
from pipeinfer.core.links import Link
from pipeinfer.core.messages import Failed, Message
from pipeinfer.core.ports import (
    Closed,
    Event,
    Output,
    Pair,
    Send,
    Stalled,
    Started,
    Transport,
)
from pipeinfer.core.self_draft import is_self_draft
from pipeinfer.core.version import __version__
from pipeinfer.orchestrator.machine import Orchestrator
from pipeinfer.placement.roles import Plan, Role, count, group_of, rank_of_role
from pipeinfer.runtime.executor import Executor
from pipeinfer.runtime.job_spec import JobSpec
from pipeinfer.runtime.shards import load_shards
from pipeinfer.runtime.trace import Header, TraceWriter
from speculation.schedules.policy import Policy
from speculation.schedules.schedule import Placement
from stages.kernels.group import slot_nbytes
from stages.kernels.library import library
from stages.models.group_shard import Follower
from stages.models.path_trial import choose_path

if TYPE_CHECKING:
    from launch.mpi import World
    from launch.preflight import Cleared
    from launch.rendezvous import Rendezvous
    from stages.kernels.group import Group

SAVE_S = 1.0
"""How long a rank that has failed leaves the head's program to save what was decoded."""
PROBE_S = 2.0
"""Least time that silent roles get to answer before the head gives up on them."""


@dataclass(frozen=True, slots=True)
class RankFacts:
    """One rank as reports show it."""

    rank: int
    host: str
    roles: list[str]
    layers: list[int] | None  # first and last, of its stage
    weight_nbytes: int
    threads: int
    exchanges: str = ""  # of a group: how they go


class Job:
    """This rank's part of the job that ``config`` and ``plan`` describe; ``world`` is None for a rank that is alone.

    ``group`` shares the rank's models with other ranks; one that does not lead it only follows.
    ``rendezvous`` watches the ranks while they load.
    ``cache`` has pass times of earlier jobs.
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
        rendezvous: Rendezvous | None = None,
        cache: PassCache | None = None,
        group: Group | None = None,
    ) -> None:
        self._config = config
        self._world = world
        self._group = group
        rank = world.rank if world else 0
        one_rank_leads = all(rank_roles[0].part for rank_roles in plan[1:])
        placement = placement or (world.placement if world and not one_rank_leads else "alone")
        job_spec = _job_spec(config, plan, context, placement, pair.draft_contexts)
        found: dict[str, Any] = {"stages": [], "drafts": []}
        with rendezvous.busy("loading") if rendezvous else nullcontext():
            self._shards = load_shards(job_spec, plan[rank], pair)
            if group is None and are_of_use(job_spec):
                found = measured(job_spec, plan[rank], self._shards, pair, cache)
        if rendezvous is not None:
            rendezvous.wait(Backoff(long_s=LONGEST_S).wait)
        if group is not None:  # exchanges of MPI's would meet the heartbeats of loading
            found = self._try_group(job_spec, plan[rank], pair, cache)
        if are_of_use(job_spec):
            job_spec = JobSpec.of(job_spec.numbers() | agreed(found, world))
        self._trace = _open_trace(config, plan, job_spec, rank) if config.trace is not None else None
        self._transport: Transport | None = None
        self.traffic = (0, 0)
        if world is not None:
            from launch.mpi import MpiTransport

            self._transport = MpiTransport(world.comm, world.node, pair.pack, pair.unpack, job_spec.window)
            if link is not None:
                self._transport = PacedLinks(self._transport, link)
            if not world.is_head:
                world.before_abort = self._tell_head
        self._driver = Driver(rank_of_role(plan), self._transport)
        machines = [job_spec.machine(role.address) for role in plan[rank] if not role.part]
        self._orchestrator = next((machine for machine in machines if isinstance(machine, Orchestrator)), None)
        observer = self._trace.write if self._trace else None
        self._executor = Executor(machines, self._shards, self._driver, observer, clock=time.monotonic)
        self._driver.executor = self._executor
        self._address = plan[rank][0].address
        self.ranks = self._gather(plan[rank], rank, sum(shard.weight_nbytes for shard in self._shards.values()))
        for address in self._executor.addresses:
            self._driver.deliver(address, Started())

    def _gather(self, roles: tuple[Role, ...], rank: int, weight_nbytes: int) -> list[dict[str, Any]]:
        layers = next(([role.layers.start, role.layers.stop - 1] for role in roles if role.layers), None)
        threads = self._world.threads if self._world else alone(self._config.threads)
        names, exchanges = [role.name for role in roles], self._group.paths if self._group else ""
        facts = RankFacts(rank, socket.gethostname(), names, layers, weight_nbytes, threads, exchanges)
        return self._world.gather(asdict(facts)) if self._world else [asdict(facts)]

    def _try_group(
        self, job_spec: JobSpec, roles: tuple[Role, ...], pair: Pair, cache: PassCache | None
    ) -> dict[str, Any]:
        """Choose how exchanges go, and measure passes where that is of use. Collective among the group's ranks."""
        found: dict[str, Any] = {"stages": [], "drafts": []}
        if self._follows:
            self._follow()
            return found
        assert self._group is not None
        stage = next(role for role in roles if role.layers is not None)
        if self._config.fused == "auto" and self._group.can_fuse:
            blank = pair.blank if stage.layers and stage.layers.start else None
            choose_path(self._group, self._shards[stage.address], sum(job_spec.slots), blank)
        if are_of_use(job_spec):
            found = measured(job_spec, roles, self._shards, pair, cache)
        self._release()
        return found

    @property
    def _follows(self) -> bool:
        """Whether another rank leads this one's group."""
        return self._group is not None and not self._group.leads

    def _follow(self) -> None:
        """Compute what the leader of the group says, until it releases this rank."""
        assert self._group is not None
        self._group.follow(Follower(self._group).handle)

    def _release(self) -> None:
        """As a leader: end ``_follow`` on the other ranks of the group."""
        if self._group is not None and not self._follows:
            self._group.tell("end")

    def deliver(self, event: Event) -> None:
        """On the head: hand the orchestrator an event from outside."""
        self._driver.deliver(ORCHESTRATOR, event)

    def turn(self) -> deque[tuple[float, Output]]:
        """On the head: let in what has arrived, compute one layer, or wait a little. Returns the commands for the user
        with their times, for the caller to take."""
        self._driver.turn()
        return self._driver.outputs

    def wake(self) -> None:
        """From any thread: end the wait of a turn."""
        self._driver.wake()

    @property
    def load(self) -> tuple[int, int, float]:
        """See Orchestrator."""
        assert self._orchestrator is not None
        return self._orchestrator.load

    @property
    def is_stalled(self) -> bool:
        """Whether nothing has moved for as long as the job allows."""
        timeout_s = self._config.timeout_s
        return timeout_s > 0 and time.monotonic() - self._driver.moved_at > timeout_s

    def explain(self) -> str:
        """Nothing has moved for long: ask every role what it is doing; their answers, or nothing where one of them is
        computing: a layer may take longer than the job allows for silence, and its rank answers only after it."""
        assert self._orchestrator is not None
        roster, began = self._orchestrator.roster, time.monotonic()
        self.deliver(Stalled())
        until = began + max(PROBE_S, self._config.timeout_s)
        self._driver.run(lambda: roster.is_heard or time.monotonic() > until)
        if roster.is_busy:
            return ""
        answers = "\n  ".join(self._orchestrator.report())
        waited = f"nothing has moved for {self._config.timeout_s:g} s (--timeout allows more)"
        return f"{waited}; what each role reports:\n  {answers}"

    def serve(self) -> None:
        """On the other ranks: serve until the head closes."""
        if self._follows:
            self._follow()
        self._driver.run(lambda: self._executor.is_halted)
        self._end()

    def _tell_head(self, code: int) -> None:
        """This rank has failed and will end the job with exit code ``code``: let the head's program save what it has;
        it ends the job as soon as it has."""
        assert self._transport is not None
        until, backoff = time.monotonic() + SAVE_S, Backoff()
        self._driver.send(Send(Message(self._address, ORCHESTRATOR, Failed(code))), 0.0)
        while time.monotonic() < until:
            self._transport.poll()
            backoff.wait()

    def close(self) -> None:
        """On the head: end the job. Collective with the other ranks' ``serve``."""
        self.deliver(Closed())
        self._driver.run(lambda: self._executor.is_halted, self._config.timeout_s, self.explain)
        self._end()

    def kill(self) -> None:
        """Release this process's resources of the job, models included."""
        self._shards.clear()
        if self._group is not None:
            self._group.parts.clear()
        self._driver.close()
        if self._trace is not None:
            self._trace.close()

    def _end(self) -> None:
        self._release()
        if self._transport is not None:
            assert self._world is not None
            self._world.before_abort = None
            self._transport.close()
            sent = self._world.gather({"messages": self._transport.messages, "nbytes": self._transport.nbytes})
            self.traffic = (sum(rank["messages"] for rank in sent), sum(rank["nbytes"] for rank in sent))
            if self._group is not None:
                self._group.close()
        self.kill()


def _job_spec(
    config: Config, plan: Plan, context: int, placement: Placement, draft_contexts: tuple[int, ...]
) -> JobSpec:
    """What ``config`` says of the machines of ``plan``, before anything is measured."""
    return JobSpec(
        *count(plan),
        Policy(**config.policy),
        context,
        config.digest(),
        calibrations=config.calibrations,
        placement=placement,
        draft_contexts=draft_contexts,
        max_num_seqs=config.max_num_seqs,
        kv_slots=config.kv_slots,
        keeps_prefixes=config.prefix_caching,
    )


def load(cleared: Cleared, world: World | None, rendezvous: Rendezvous | None = None) -> Job:
    """This rank's part of the job that ``cleared`` describes, with its share of the models. Collective. Raises
    UserError for what cannot be loaded, StallError for a rank that makes no progress."""
    config = cleared.config
    if world is None or world.is_head:
        _say_once(cleared.note)
        kernels = library()
        if kernels is not None and not kernels.is_fused:
            _say_once("this processor has no fused multiply-add: kernels are slow, with other bits than elsewhere")
    group = _group(cleared, world, rendezvous) if world is not None and config.tp > 1 else None
    with rendezvous.busy("loading") if rendezvous else nullcontext(), paused():
        import torch

        from stages.models.pair import CheckpointPair

        cores = world.cores if world else None
        if config.tp > 1 and cores is not None:  # the ranks of a group compute at the same time
            cores = replace(cores, count=cores.fair, busy=None)
        threads = start_threads(config.threads, cores)
        if world is not None:
            world.threads = threads
        torch.set_num_threads(threads if library() is None else 1)
        pair = CheckpointPair(
            cleared.target,
            cleared.drafts,
            config.dtype,
            config.forced_acceptance,
            config.draft_dtypes,
            config.numerics,
            group,
            grammars_of(config.tokenizer_directory, cleared.target[0]),
            config.weights_memory,
            config.activations,
        )
    cache = _cache(cleared, world, threads)
    return Job(config, cleared.plan, cleared.context, pair, world, rendezvous=rendezvous, cache=cache, group=group)


def _group(cleared: Cleared, world: World, rendezvous: Rendezvous | None) -> Group | None:
    """This rank's group. Collective."""
    if rendezvous is not None:
        world.meet(rendezvous.poll)
    config = cleared.config
    specs = [spec for spec, _ in (cleared.target, *cleared.drafts)]
    slot = slot_nbytes([spec.hidden_size for spec in specs], [spec.vocab_size for spec in specs])
    first, size = group_of(cleared.plan, world.rank)
    member = world.rank - first if size > 1 else None
    return world.group(size, member, slot, config.fused, config.timeout_s)


def _cache(cleared: Cleared, world: World | None, threads: int) -> PassCache:
    """Pass times of jobs like this one, whose ranks have ``threads`` threads."""
    import torch

    config = cleared.config
    common = {
        "models": [model_digest(place) for place in (config.target_directory, *config.draft_directories)],
        "self_drafts": [name for name in config.drafts if is_self_draft(name)],
        "dtypes": [config.dtype, *config.draft_dtypes],
        "numerics": config.numerics,
        "activations": config.activations,
        "isa": kernels.isa if (kernels := library()) else str(torch.backends.cpu.get_cpu_capability()),
        "build": kernels.build if kernels else "",
        "threads": threads,
        "ranks": world.size if world else 1,
        "tp": [config.tp, config.fused],
        "weights_memory": config.weights_memory,
        "forced": bool(config.forced_acceptance),
    }
    return PassCache(common)


@cache
def _say_once(note: str) -> None:
    """Write ``note``, if it is anything, to standard error, once a process."""
    if note:
        write(f"pipeinfer: {note}")


def _open_trace(config: Config, plan: Plan, job_spec: JobSpec, rank: int) -> TraceWriter:
    roles = [role for role in plan[rank] if not role.part]  # who only follows has no machine, and no events
    layers = next(([role.layers.start, role.layers.stop] for role in roles if role.layers), None)
    header = Header(
        rank,
        len(plan),
        [role.address for role in roles],
        job_spec.numbers(),
        asdict(config),
        layers,
        socket.gethostname(),
        __version__,
        time.time() - time.monotonic(),
    )
    return TraceWriter(config.trace or "", header)
