"""One thing goes wrong in one rank of a real job: does the whole job end soon, with the right code and one message?

    python -m tests.faults.matrix            # every rank, phase, entry, kind of fault and way to start: an hour
    python -m tests.faults.matrix --entry run --kind exception
    python -m tests.faults.matrix --mpi .venv-mpich      # another environment's MPI

Prints a table, a row for each entry and way to start, and ends with exit code 1 where a case failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

from launch.mpiexec import command

ROOT = Path(__file__).resolve().parents[2]
PLANTED = Path(__file__).parent / "planted"
CODES = {"exception": 1, "exit": 7, "interrupt": 130, "sigterm": 143}
FROZEN = {"freeze": 3}
"""For tests of its own: it takes as long as --timeout says."""
PHASES = ("checking", "loading", "serving", "closing")
RANKS = 2
HANG_S = 300.0
"""So long a case may take, start included, before it counts as a hang; a busy machine starts slowly."""
SOON_S = 5.0
PROMPT = ("--prompt", "def read_lines(path):\n", "--max-new-tokens", "40", "--ignore-eos")
MODULE = ("-m", "pipeinfer")
PROGRAM = str(Path(__file__).parent / "program.py")
ENTRIES: dict[str, tuple[str, ...]] = {
    "run": (*MODULE, "run", *PROMPT),
    "calibrate": (*MODULE, "calibrate", "--prompts", "{place}/prompts", "--out", "{place}/out", "--max-new-tokens",
                  "24"),
    "bench": (*MODULE, "bench", "real-builtin", "--ranks", str(RANKS), "--repeats", "1", "--prompts", "1", "--tokens",
              "24", "--policies", "continuous"),
    "doctor": (*MODULE, "doctor"),
    "engine": (PROGRAM,),
}  # fmt: skip
STARTS = ("spawned", "mpirun")


@dataclass(frozen=True, slots=True)
class Case:
    """``entry`` started by ``start``; in ``phase`` a fault of ``kind`` happens to ``rank``."""

    entry: str
    start: str
    rank: int
    phase: str
    kind: str

    def __str__(self) -> str:
        return f"{self.entry} {self.start}: rank {self.rank}, {self.phase}, {self.kind}"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended: its exit code (None: it hung), seconds after the fault, and our lines on standard error."""

    code: int | None
    seconds: float
    ours: list[str]
    said: str

    def fault(self, case: Case) -> str:
        """What is wrong with it; empty if nothing is."""
        if self.code is None:
            return "hangs"
        if self.code != (CODES | FROZEN)[case.kind]:
            return f"exit code {self.code}"
        if len(self.ours) != 1 or self.said.count("Traceback") != (case.kind == "exception"):
            return f"{len(self.ours)} messages, {self.said.count('Traceback')} tracebacks"
        return "" if f"rank {case.rank} " in self.ours[0] else "another rank is named"


def cases() -> Iterator[Case]:
    """All that can happen: a doctor neither loads nor serves, and has only ranks that a launcher started."""
    for entry, start, rank, phase, kind in product(ENTRIES, STARTS, range(RANKS), PHASES, CODES):
        if entry == "doctor" and (start == "spawned" or phase != "checking" or rank):
            continue
        if entry == "engine" and start == "spawned":
            continue  # that is `run`
        yield Case(entry, start, rank, phase, kind)


def pairwise_cases(mpis: tuple[str, ...]) -> list[tuple[str, Case]]:
    """Few cases, each with an MPI, in which every pair of values of two properties occurs that occurs at all."""
    left = [(mpi, case) for mpi in mpis for case in cases()]
    missing = set().union(*(_pairs(one) for one in left))
    chosen = []
    while missing:
        best = max(left, key=lambda one: len(_pairs(one) & missing))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(one: tuple[str, Case]) -> set[tuple[tuple[str, object], ...]]:
    mpi, case = one
    values = [("mpi", mpi), *((name, getattr(case, name)) for name in Case.__slots__)]
    return set(combinations(values, 2))


def end(case: Case, python: str = sys.executable, more: Sequence[str] = ()) -> Ending:
    """Start the job of ``case``, with ``more`` arguments, and wait for its end."""
    with tempfile.TemporaryDirectory() as place:
        Path(place, "prompts").write_text("import os\n")
        words = [python, *(word.format(place=place) for word in ENTRIES[case.entry]), *more]
        environ = dict(os.environ)
        if case.start == "mpirun":
            words, environ = command(RANKS, words, python)
        elif case.entry != "bench":
            words += ["--ranks", str(RANKS)]
        environ["PYTHONPATH"] = os.pathsep.join([str(PLANTED), str(ROOT)])
        at = Path(place, "at")
        environ |= {"PIPEINFER_FAULT": f"{case.rank},{case.phase},{case.kind}", "PIPEINFER_FAULT_AT": str(at)}
        with tempfile.TemporaryFile("w+") as said:
            job = subprocess.Popen(
                words, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
                start_new_session=True, cwd=ROOT,
            )  # fmt: skip
            code = _wait(job)
            ended = time.time()
            said.seek(0)
            text = said.read()
        happened = float(at.read_text()) if at.exists() else ended + 1e6  # it never happened: no small number
    ours = [line for line in text.splitlines() if line.startswith("pipeinfer: ")]
    return Ending(code, ended - happened, ours, text)


def _wait(job: subprocess.Popen[bytes]) -> int | None:
    """The exit code of ``job``, or None after HANG_S; nothing of it is left then."""
    try:
        return job.wait(HANG_S)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGTERM)
        try:
            job.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
        return None


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, choices in (("entry", tuple(ENTRIES)), ("start", STARTS), ("phase", PHASES), ("kind", tuple(CODES))):
        parser.add_argument(f"--{name}", choices=choices)
    parser.add_argument("--mpi", metavar="VENV", help="the environment whose Python and MPI are used")
    args = parser.parse_args()
    python = str(Path(args.mpi).resolve() / "bin" / "python") if args.mpi else sys.executable
    rows: dict[tuple[str, str], list[tuple[Case, Ending]]] = {}
    for case in cases():
        asked = (getattr(args, name) in (None, getattr(case, name)) for name in ("entry", "start", "phase", "kind"))
        if all(asked):
            ending = end(case, python)
            rows.setdefault((case.entry, case.start), []).append((case, ending))
            wrong = ending.fault(case) or ("late" if ending.seconds > SOON_S else "")
            print(f"{case}: {wrong or 'ok'}, {ending.seconds:.1f} s", file=sys.stderr, flush=True)
            if wrong:
                print(ending.said, file=sys.stderr, flush=True)
    print("| entry | started by | cases | right code, one message | slowest end after the fault |\n|--|--|--|--|--|")
    for (entry, start), found in rows.items():
        right = sum(not ending.fault(case) for case, ending in found)
        print(f"| {entry} | {start} | {len(found)} | {right} | {max(ending.seconds for _, ending in found):.1f} s |")
    return int(any(ending.fault(case) for found in rows.values() for case, ending in found))


if __name__ == "__main__":
    raise SystemExit(main())
