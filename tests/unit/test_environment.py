"""What launchers leave in the environment, as seen with Open MPI 5, MPICH 5 and Slurm 22.05."""

from __future__ import annotations

import pytest

from launch.environment import Launch, launched, refuse_singletons
from pipeinfer.core.errors import UserError

OPEN = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "2"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (OPEN, "Open MPI mpirun"),
        (HYDRA, "MPICH mpiexec"),
        (SRUN, "srun"),
        ({**SRUN, **HYDRA}, "srun"),  # --mpi=pmi2
        ({**SRUN, **OPEN}, "Open MPI mpirun"),  # mpirun in a batch script reaches other nodes by srun
        ({**SRUN, **HYDRA, "SLURM_STEP_NUM_TASKS": "1"}, "srun"),  # mpiexec in a shell that srun started
    ],
)
def test_launchers_are_told_apart(environ: dict[str, str], launcher: str) -> None:
    assert launched(environ) == Launch(launcher, 4, 2)


ONE = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"},
        ONE,  # srun --pty bash
        {**ONE, "PMI_SIZE": "1", "PMI_RANK": "0"},  # srun --mpi=pmi2 --pty bash
        {**SRUN, "SLURM_STEP_ID": "4294967291"},  # the batch script itself, as newer versions number it
        {**SRUN, "SLURM_PROCID": "4"},  # no rank of four
        {**HYDRA, "PMI_SIZE": "²"},
        {**OPEN, "OMPI_COMM_WORLD_SIZE": "0"},
    ],
)
def test_a_shell_or_a_batch_script_is_no_launcher(environ: dict[str, str]) -> None:
    assert launched(environ) is None


@pytest.mark.parametrize(("environ", "fix"), [(OPEN, "openmpi"), (HYDRA, "mpich"), (SRUN, "srun --mpi=pmix")])
def test_singletons_are_refused_with_the_fix(environ: dict[str, str], fix: str) -> None:
    launch = launched(environ)
    with pytest.raises(UserError, match=fix):
        refuse_singletons(launch, 1)
    refuse_singletons(launch, 4)
    refuse_singletons(None, 1)
