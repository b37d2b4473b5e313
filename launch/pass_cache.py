"""Pass times of earlier jobs, one small file for each shard: what was measured once on a host need not be again.

The files are in ``pipeinfer`` below XDG_CACHE_HOME (by default ~/.cache). PIPEINFER_CACHE=off turns this off: then
every job measures. Nothing that is wrong with the directory or a file ever fails a job. A file that cannot be read,
that is of another shard or too old counts as none. The first few jobs measure all the same, and a file has the least
times of all: one busy moment does not spoil it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeinfer.core.errors import CheckpointError
from pipeinfer.core.files import write_whole
from pipeinfer.core.version import __version__
from pipeinfer.runtime.pass_times import ROWS, PassTimes
from stages.checkpoint.folder import is_gguf_name
from stages.checkpoint.gguf_config import config_of
from stages.checkpoint.gguf_file import read_gguf

FORMAT = 1
ENOUGH = 3
"""Jobs that measure before the file alone is believed."""
OLDEST_S = 30 * 86400.0
"""Age from which on a file counts as none: machines change."""
MOST_NBYTES = 1 << 16
CPUINFO = Path("/proc/cpuinfo")


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where the files are; None if nothing is to be kept."""
    if environ.get("PIPEINFER_CACHE", "").lower() in ("off", "0", "no"):
        return None
    given = environ.get("XDG_CACHE_HOME", "")
    with contextlib.suppress(RuntimeError):  # there is no home
        return (Path(given) if Path(given).is_absolute() else Path.home() / ".cache") / "pipeinfer"
    return None


def processor() -> str:
    """The processor's name and the instruction sets that it has, as a digest of what the system says of them."""
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return os.uname().machine
    said = dict(line.split(":", 1) for line in reversed(lines) if ":" in line and line.startswith(wanted))
    return _digest([os.uname().machine, sorted((name.strip(), value.strip()) for name, value in said.items())])


def model_digest(directory: Path) -> str:
    """A digest of the model's config.json, or of what a GGUF file says of its model and of the types of its tensors;
    empty where there is none."""
    if is_gguf_name(directory):
        return _gguf_digest(directory)
    try:
        return hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _gguf_digest(path: Path) -> str:
    try:
        file = read_gguf(path)
        kinds = sorted((name, tensor.kind) for name, tensor in file.tensors.items())
        return hashlib.sha256(json.dumps([config_of(file), kinds]).encode()).hexdigest()[:16]
    except CheckpointError:
        return ""


class PassCache:
    """The times of shards whose ``common`` facts are these, beside this processor and this version."""

    def __init__(self, common: Mapping[str, Any], directory: Path | None = None) -> None:
        self._common = {"format": FORMAT, "pipeinfer": __version__, "processor": processor(), **common}
        self._directory = cache_directory() if directory is None else directory

    def _place(self, facts: Mapping[str, Any]) -> tuple[Path | None, dict[str, Any]]:
        key = json.loads(json.dumps({**self._common, **facts}))
        return None if self._directory is None else self._directory / f"passes-{_digest(key)}.json", key

    def read(self, **facts: Any) -> tuple[PassTimes, int]:
        """The times of the shard that ``facts`` tell from others, and how many jobs have measured them; empty and 0
        where they are not known."""
        path, key = self._place(facts)
        try:
            if path is None or path.stat().st_size > MOST_NBYTES:
                return [], 0
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] != key or not 0 <= time.time() - found["when"] < OLDEST_S:
                return [], 0
            times = [(rows, float(seconds)) for rows, seconds in found["passes"]]
            return (times, max(1, int(found["jobs"]))) if _are_times(times) else ([], 0)
        except (OSError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
            return [], 0

    def times(self, measure: Callable[[], PassTimes], **facts: Any) -> PassTimes:
        """The times of the shard that ``facts`` tell from others: known ones, or the least of those and what
        ``measure`` finds."""
        known, jobs = self.read(**facts)
        if jobs >= ENOUGH:
            return known
        found, before = dict(measure()), dict(known)
        times = sorted((rows, min(seconds, before.get(rows, seconds))) for rows, seconds in (before | found).items())
        self.write(times, jobs + 1, **facts)
        return times

    def write(self, times: PassTimes, jobs: int = 1, **facts: Any) -> None:
        """Keep ``times``, which so many ``jobs`` have measured, if there are any and if they can be kept."""
        path, key = self._place(facts)
        if path is None or not times:
            return
        with contextlib.suppress(Exception):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps({"key": key, "when": time.time(), "jobs": jobs, "passes": times}))


def _are_times(times: PassTimes) -> bool:
    rows = [rows for rows, _ in times]
    return rows == sorted(set(rows) & set(ROWS)) and all(0 < seconds < math.inf for _, seconds in times)


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
