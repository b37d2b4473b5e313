"""Running the command line: in a process of its own, as a user does, or in this one, where the same program runs and
a start, which takes most of the time, is saved."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

from pipeinfer.cli import main

ROOT = Path(__file__).resolve().parents[2]
NOTE = re.compile(r"^pipeinfer: without the kernel library .*\n", re.MULTILINE)


def pipeinfer(
    *arguments: str, stdin: bytes = b"", timeout_s: float = 300.0, environ: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``pipeinfer ARGUMENTS``, from the checkout. Where there is no kernel library a job says so in one line: that line
    is left out here, so that tests are the same with the library and without."""
    line = [sys.executable, "-m", "pipeinfer", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})}
    done = subprocess.run(line, input=stdin, env=env, capture_output=True, timeout=timeout_s, check=False)
    told = NOTE.sub("", done.stderr.decode(), count=1)
    return subprocess.CompletedProcess(line, done.returncode, done.stdout.decode(), told)


def here(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """``pipeinfer ARGUMENTS`` in this process."""
    out, err, given = io.StringIO(), io.StringIO(), io.TextIOWrapper(io.BytesIO(stdin), "utf-8", "surrogateescape")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "stdin", given):
        code = main(list(arguments))
    told = NOTE.sub("", err.getvalue(), count=1)
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), told)
