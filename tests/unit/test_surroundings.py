"""What ranks that we start find around them."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from launch import mpiexec, surroundings
from launch.surroundings import own_environment, refuse_lost_directory, settle, shared_memory_nbytes
from pipeinfer.core.errors import UserError

TUNED = {
    "OMPI_MCA_pml": "ucx",
    "PRTE_MCA_rmaps_default_mapping_policy": "core",
    "PMIX_MCA_gds": "hash",
    "MPIR_CVAR_DEBUG_SUMMARY": "1",
    "I_MPI_DEBUG": "5",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OPAL_PREFIX": "/opt/mpi",
    "OMP_NUM_THREADS": "2",
    "PYTHONPATH": "/mine",
}


@pytest.mark.parametrize(
    "names",
    [
        "SLURM_JOB_ID SLURM_JOB_NODELIST SLURM_STEP_ID SLURM_TASKS_PER_NODE SLURMD_NODENAME",
        "PBS_NODEFILE LSB_MCPU_HOSTS COBALT_NODEFILE FLUX_URI PE_HOSTFILE OAR_NODEFILE PALS_APID",
        "OMPI_COMM_WORLD_SIZE OMPI_MCA_initial_wdir OMPI_MCA_num_procs PRTE_LAUNCHED PMIX_RANK PMIX_SERVER_URI41",
        "PMI_FD PMI_RANK HYDI_CONTROL_FD HYDRA_LAUNCHER MPI_LOCALRANKID I_MPI_HYDRA_BOOTSTRAP",
    ],
)
def test_ranks_hear_nothing_of_an_outer_job(names: str) -> None:
    outer = dict.fromkeys(names.split(), "1")
    assert own_environment({**TUNED, **outer}) == TUNED


def unusable(kind: str, place: Path) -> str:
    """A TMPDIR of the ``kind``."""
    if kind == "file":
        (place / "file").touch()
    elif kind == "x" * 90:
        (place / kind).mkdir()
    return str(place / kind) if kind != "relative" else "."


@pytest.mark.parametrize("kind", ["missing", "file", "x" * 90, "relative"])
def test_a_place_for_files_is_found_where_tmpdir_is_none(kind: str, tmp_path: Path) -> None:
    environ = {"TMPDIR": unusable(kind, tmp_path), "HOME": "/"}
    place = settle(environ)
    assert place == environ["TMPDIR"] and place in surroundings.PLACES


def test_a_tmpdir_that_can_be_used_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "PLACES", ("/nowhere",))
    environ = {"TMPDIR": "/tmp", "HOME": "/"}
    assert settle(environ) == "/tmp" and environ == {"TMPDIR": "/tmp", "HOME": "/"}
    with pytest.raises(UserError, match="/nowhere.*set TMPDIR"):
        settle({"HOME": "/"})


def test_a_full_disk_is_no_place_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_to_write(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(surroundings.tempfile, "TemporaryFile", refuse_to_write)
    with pytest.raises(UserError, match="no temporary file can be written"):
        settle({"TMPDIR": str(tmp_path)})


def test_a_home_is_given_to_users_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    environ: dict[str, str] = {}
    settle(environ)
    assert "HOME" not in environ, "the password file knows one"

    def nobody(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert settle(environ) == environ["HOME"]


def test_shared_memory_that_is_missing_or_locked_has_no_room(tmp_path: Path) -> None:
    assert shared_memory_nbytes(str(tmp_path)) > 0
    assert shared_memory_nbytes(str(tmp_path / "missing")) == 0


@pytest.mark.parametrize(
    ("nbytes", "host", "says"),
    [
        (27 << 20, "here", "/dev/shm has room for 27 MB, and 2 ranks of MPICH need 28 MB"),
        (28 << 20, "h" * 64, "64 characters"),
    ],
)
def test_where_mpich_would_crash_it_is_not_started(nbytes: int, host: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        mpiexec.refuse_what_mpich_cannot(2, nbytes, host)
    mpiexec.refuse_what_mpich_cannot(2, 28 << 20, "h" * 63)


def test_a_current_directory_that_is_gone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    refuse_lost_directory()
    gone.rmdir()
    with pytest.raises(UserError, match="the current directory cannot be used"):
        refuse_lost_directory()


def launcher(place: Path, script: str) -> str:
    """A program in ``place`` that is called mpiexec."""
    program = place / "mpiexec"
    program.write_text(script)
    program.chmod(0o755)
    return str(program)


def test_a_launcher_is_known_by_either_stream(tmp_path: Path) -> None:
    program = launcher(tmp_path, "#!/bin/sh\necho 'mpiexec (Open MPI) 5.0' >&2\n")
    assert mpiexec.OPEN_MPI.search(mpiexec.ask_version(program, dict(os.environ)))


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("#!/bin/sh\nexec tail -f /dev/null\n", "prints nothing"),
        ("#!/bin/sh\ntail -f /dev/null\nexit\n", "prints nothing"),  # its child holds the pipe
        ("#!/no/such/shell\n", "cannot be started"),
    ],
    ids=["hangs", "child-hangs", "no-shell"],
)
def test_a_launcher_that_says_nothing_is_refused(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mpiexec, "VERSION_S", 0.2)
    with pytest.raises(UserError, match=says):
        mpiexec.ask_version(launcher(tmp_path, script), dict(os.environ))
