"""The needs of ranks that we start: an environment without an outer job's variables, a temporary directory, and shared
memory."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import tempfile
from collections.abc import Mapping

from pipeinfer.core.errors import refuse

OUTER_JOB = re.compile(
    r"(SLURMD?|PBS|LSB|FLUX|COBALT|OAR|JSM|PALS|ALPS|PMI2?|PMIX|HYDRA|HYDI|I_MPI_HYDRA|OMPI|PRTE)_"
    r"|MPI_LOCAL|PE_HOSTFILE$"
)
"""Variables in which batch systems and launchers describe their own jobs and steps."""
ON_PURPOSE = re.compile(
    r"(OMPI|PRTE|PMIX)_(MCA_(?!PREFIXES$|cpu_type$|initial_wdir$|num_procs$|ess|orte_(ess|hnp|local|num|app)_)"
    r"|ALLOW_RUN_AS_ROOT|PREFIX$)"
)
"""Variables with these prefixes that tune MPI; the exceptions are set by Open MPI for its ranks."""
LONGEST_NAME = 64
"""Launchers make directories in the temporary one, and sockets there, whose names end at 107 bytes."""
PLACES = ("/tmp", "/var/tmp", "/dev/shm")
SHARED_MEMORY = "/dev/shm"


def own_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """``environ`` without what an outer job or a larger allocation has set: our ranks are a job on this host."""
    return {name: value for name, value in environ.items() if not OUTER_JOB.match(name) or ON_PURPOSE.match(name)}


def settle(environ: dict[str, str]) -> str:
    """Give ``environ`` a TMPDIR that can be used, where it has none, and a HOME where nobody knows of one; returns the
    directory for temporary files. Raises UserError where there is none."""
    named = environ.get("TMPDIR")
    place = next(filter(_takes_files, filter(None, (named, *PLACES))), None)
    if place is None:
        refuse(f"no temporary file can be written in {', '.join(filter(None, (named, *PLACES)))}", "set TMPDIR")
    if place != (named or PLACES[0]):
        environ["TMPDIR"] = place
    if "HOME" not in environ:
        with contextlib.suppress(KeyError):
            pwd.getpwuid(os.getuid())
            return place
        environ["HOME"] = place
    return place


def _takes_files(place: str) -> bool:
    """Whether something can be written in the directory ``place``, whose name is not too long for a launcher."""
    if not os.path.isabs(place) or len(os.fsencode(place)) > LONGEST_NAME:
        return False
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            return file.write(bytes(4096)) == 4096
    except OSError:
        return False


def shared_memory_nbytes(place: str = SHARED_MEMORY) -> int:
    """How much memory can be shared through ``place``: its free bytes, 0 where nothing can be made there."""
    if not os.access(place, os.W_OK | os.X_OK):
        return 0
    room = os.statvfs(place)
    return room.f_bavail * room.f_frsize


def refuse_lost_directory() -> None:
    """Raise UserError where the current directory is none that ranks could start in."""
    try:
        os.stat(os.getcwd())
    except OSError as error:
        refuse(f"the current directory cannot be used ({error.strerror})", "change to another one, and start there")
    if not os.access(".", os.X_OK):
        refuse("the current directory may not be entered", "change to another one, and start there")
