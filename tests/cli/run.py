"""Running the command line as a user does: a process of its own, its output and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pipeinfer(
    *arguments: str, stdin: bytes = b"", timeout_s: float = 300.0, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``pipeinfer ARGUMENTS``, from the checkout."""
    line = [sys.executable, "-m", "pipeinfer", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})}
    done = subprocess.run(line, input=stdin, env=env, capture_output=True, timeout=timeout_s, check=False)
    return subprocess.CompletedProcess(line, done.returncode, done.stdout.decode(), done.stderr.decode())
