"""Opens the job of an engine: in this process, on ranks of its own, or as a rank of an MPI job.

torch and MPI are imported only where they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launch.environment import launched, refuse_singletons
from launch.preflight import Cleared
from pipeinfer.core.config import Config
from pipeinfer.core.errors import UserError
from pipeinfer.engine.answer import HeadJob

if TYPE_CHECKING:
    from mpi4py import MPI

    from launch.job import Job
    from launch.mpi import World
    from launch.rendezvous import Rendezvous


class RefusedElsewhere(UserError):
    """The job was refused, and rank 0 says why."""

    is_told = True


def open_world(comm: MPI.Intracomm | None) -> World | None:
    """The MPI job that this process is part of, or None. ``comm``: the program's own communicator, if it gave one.

    Raises UserError for ranks that the launcher started and MPI did not join."""
    launch = launched()
    if comm is None and (launch is None or launch.size == 1):
        return None
    from launch.mpi import World

    world = World(comm)
    if comm is None:
        _refuse_singletons(world)
    return world


def _refuse_singletons(world: World) -> None:
    launch = launched()
    try:
        refuse_singletons(launch, world.size)
    except UserError as error:
        raise (error if launch is None or launch.leads else RefusedElsewhere(str(error))) from None


def load_job(cleared: Cleared, world: World | None = None, rendezvous: Rendezvous | None = None) -> Job:
    """See launch.job.load, which imports torch."""
    from launch.job import load

    return load(cleared, world, rendezvous)


def lead_job(job: Job, world: World | None = None) -> HeadJob:
    """Lead ``job``, whose head is this process: on a thread of its own, unless MPI allows none."""
    from launch.head import LocalJob

    return LocalJob(job, world is None or world.may_thread, None if world is None else world.fail)


def spawn_job(config: Config, ranks: int) -> HeadJob:
    """Start ``ranks`` ranks on this machine for ``config``, and wait until they have loaded. Raises UserError where
    mpiexec cannot be run, RanksFailed for ranks that end, StallError for a rank that makes no progress."""
    from launch.spawn import SpawnedJob

    return SpawnedJob(config, ranks)
