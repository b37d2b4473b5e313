"""Nobody waits for a help text: what is not needed is not loaded. Modules are counted, because times say more about a
machine's other users."""

from __future__ import annotations

import subprocess
import sys

from tests.house.source import ROOT

HEAVY = {"torch", "mpi4py", "transformers", "numpy"}


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)


def loaded(program: str) -> set[str]:
    """The modules that ``program`` loads, beside those that Python has loaded when it begins."""
    code = f"import sys; there = set(sys.modules)\n{program}\nprint(*set(sys.modules) - there, file=sys.stderr)"
    return set(python("-c", code).stderr.split())


def test_import_is_light() -> None:
    found = loaded("import pipeinfer")
    assert not HEAVY & found
    assert len(found) < 60


def test_help_is_light() -> None:
    found = loaded("from pipeinfer.cli import main; main(['--help'])")
    assert not HEAVY & found
    assert len(found) < 200
