"""Fingerprints: where, when and with what a row was measured."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeinfer.core.version import __version__

CPUINFO = Path("/proc/cpuinfo")


def fingerprint(config: Mapping[str, Any], mpi: str) -> dict[str, Any]:
    """The host's and the software's; ``config`` is told by its digest, ``mpi`` as its library gives it."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**_machine(), "mpi": mpi, "config": digest, "when": when}


@cache
def _machine() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "pipeinfer": __version__,
        "git": _git(),
    }


def version(package: str) -> str:
    """The installed version of ``package``; nothing where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git() -> str:
    """The checkout's commit, with a plus where it has changes; nothing outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        said = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.stdout.strip()
