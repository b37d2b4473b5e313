"""Nobody waits for a help text: what is not needed is not loaded.

Best of several, because machines have neighbours; where a whole process is measured, its processor time, because wall
time beside twenty other tests says more about them.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable

from tests.house.source import ROOT

HELP = "import sys; sys.argv = ['pipeinfer', '--help']; from pipeinfer.cli import main; sys.exit(main())"
HEAVY = "{name for name in ('torch', 'mpi4py', 'transformers', 'numpy') if name in sys.modules}"


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)


def best_ms(measure: Callable[[], float], limit_ms: float, attempts: int = 20) -> float:
    best = float("inf")
    for _ in range(attempts):
        best = min(best, measure())
        if best < limit_ms:
            break
    return best


def import_ms() -> float:
    told = python("-X", "importtime", "-c", "import pipeinfer").stderr.splitlines()
    (line,) = [line for line in told if line.split("|")[-1].strip() == "pipeinfer"]
    return int(line.split("|")[1]) / 1000


def children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def help_ms() -> float:
    before = children_s()
    assert "pipeinfer" in python("-c", HELP).stdout
    return (children_s() - before) * 1000


def test_import_is_quick() -> None:
    assert best_ms(import_ms, 100) < 100


def test_import_is_light() -> None:
    assert python("-c", f"import sys, pipeinfer; print({HEAVY})").stdout.strip() == "set()"


def test_help_is_quick() -> None:
    assert best_ms(help_ms, 200) < 200
