"""The cores that a rank may compute on: its affinity, its cgroups' CPU quota, and what OMP_NUM_THREADS asks for.

A container or a batch system may allow a process fewer cores than it sees. Threads beyond that number wait for each
other, so the quota counts like missing cores. cgroup v2 has it in ``cpu.max`` and v1 in ``cpu.cfs_quota_us``, of the
process's own group and of every group above it. The least one is in force.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeinfer.core.errors import refuse


@dataclass(frozen=True, slots=True)
class Cores:
    """The cores of a rank. ``count``: how many it may use; ``fair``: its share of them among the ranks of the host;
    ``busy``: memory with an int32 for the threads at work on them, if ranks share them (see shared_cores.py);
    ``sharers``: how many ranks may use them."""

    count: int
    fair: int
    busy: mmap.mmap | None = None
    sharers: int = 1


ROOT = Path("/")
MOUNTS = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
"""Where the groups of cgroup v2 may be: alone, or beside those of v1."""
MOST_THREADS = 1024


def refuse_threads(threads: int | None) -> None:
    """Raise UserError for a number of threads that cannot be meant; None is a rank's fair share."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        refuse(f"--threads {threads}", f"use 1 to {MOST_THREADS}, or leave it out for a fair share of the cores")


def asked_threads(environ: Mapping[str, str] = os.environ) -> int:
    """The value of OMP_NUM_THREADS; 0 if it has none."""
    asked = environ.get("OMP_NUM_THREADS", "")
    return max(1, int(asked)) if asked.isascii() and asked.isdigit() else 0


def usable_cores(affinity: int | None = None, root: Path = ROOT) -> int:
    """How many cores this process may keep busy, at least one. ``affinity``: the cores that it may run on, by default
    what the system says; ``root``: where /proc and /sys are."""
    cores = len(os.sched_getaffinity(0)) if affinity is None else affinity
    limit = quota(root)
    return cores if limit is None else max(1, min(cores, int(limit)))


def alone(threads: int | None = None) -> int:
    """The threads of a rank that shares its cores with no other rank; ``threads``: what was asked for, if anything."""
    return threads or asked_threads() or usable_cores()


def quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that this process's cgroups allow it; None for no limit."""
    return min((limit for limit in _quotas(root) if limit > 0), default=None)


def _quotas(root: Path) -> Iterator[float]:
    """The limits of all groups that this process is in."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:
            for mount in MOUNTS:
                for group in _groups(root / mount, path):
                    yield _ratio(*_read(group / "cpu.max").split()[:2])
        elif "cpu" in controllers.split(","):
            for mount in {controllers, "cpu"}:
                for group in _groups(root / "sys/fs/cgroup" / mount, path):
                    yield _ratio(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _groups(mount: Path, path: str) -> Iterator[Path]:
    """The group ``path`` of the hierarchy at ``mount`` and all above it. In a container ``path`` may be the host's name
    of a group that is mounted as the top here; groups that are not there have no limit to read."""
    inner = PurePosixPath(path.lstrip("/"))
    if ".." not in inner.parts:
        yield from (mount / part for part in (inner, *inner.parents))


def _ratio(quota_us: str = "", period_us: str = "") -> float:
    """Cores' worth of time; 0 where the numbers are none or there is no limit."""
    try:
        return int(quota_us) / int(period_us)
    except (ValueError, ZeroDivisionError):
        return 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
