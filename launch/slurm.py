"""Batch scripts for Slurm, as text. This module uses neither Slurm nor MPI."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

from pipeinfer.core.errors import refuse

TEMPLATE = Path(__file__).with_name("templates") / "job.sbatch"


class Directive(NamedTuple):
    """An option of sbatch that a script states: its long name, what a value looks like, as a pattern and as text, the
    value if nobody gives one (None: the site's), and what it is."""

    name: str
    pattern: str
    form: str
    default: str | None
    what: str


# No pattern matches blanks, quotes, `#` or backslashes, which sbatch would read in ways of its own.
DIRECTIVES = (
    Directive("job-name", r"[\w.+-]+", "NAME", "pipeinfer", "the job's name, and of its output"),
    Directive("nodes", r"[1-9]\d*", "N", "4", "how many nodes"),
    Directive("ntasks-per-node", r"[1-9]\d*", "N", "1", "ranks on each node"),
    Directive("cpus-per-task", r"[1-9]\d*", "N", "1", "cores, and threads, of each rank"),
    Directive("mem", r"\d+[KMGT]?", "SIZE[K|M|G|T]", None, "memory of each node, in MB without a letter; 0 is all"),
    Directive("time", r"(\d+-\d+|\d+)(:\d+){0,2}", "[DAYS-]HH:MM:SS", "00:30:00", "longest time the job may take"),
    Directive("output", r"[^\s\"'#\\]+", "FILE", "%x-%j.out", "standard output: %x is the job's name, %j its number"),
    Directive("error", r"[^\s\"'#\\]+", "FILE", "%x-%j.err", "standard error, apart from results"),
    Directive("partition", r"[\w.,+-]+", "NAME", None, "partition"),
    Directive("account", r"[\w.+-]+", "NAME", None, "account"),
)

LAUNCHERS = {
    "srun": (
        "Slurm starts the ranks; --mpi is what their MPI speaks: pmix for Open MPI, pmi2 for MPICH.",
        'SLURM_PMIX_FENCE=ring srun --mpi={mpi} --cpus-per-task="$SLURM_CPUS_PER_TASK" --wait=30',
    ),
    "mpirun": (
        "Open MPI's own launcher starts the ranks, on the nodes and tasks that it finds in the allocation.",
        'mpirun --map-by slot:PE="$SLURM_CPUS_PER_TASK" --bind-to core',
    ),
}
"""The comment on each launcher, and its line without the program. srun gets the cores again because a step does not
inherit them from the batch script since Slurm 22.05. --wait is for lost ranks, which would otherwise hold the nodes:
--kill-on-bad-exit is quicker, but may kill the rank that is about to report why. With Slurm's own choice of a fence
some ranks leave MPI_Init before others have left its first barrier, and Open MPI crashes (docs/sharp-bits.md)."""


class _Script(Template):
    delimiter = "%"  # `$` is the shell's


def batch_script(
    program: Sequence[str],
    directives: Mapping[str, str | None],
    modules: Sequence[str] = (),
    venv: Path | None = None,
    launcher: str = "srun",
    mpi: str = "pmix",
) -> str:
    """A batch script that starts ``program`` once per task, after loading ``modules`` and entering ``venv``.

    ``directives`` are values of DIRECTIVES by name. Raises UserError for one that sbatch would not take, or not as it
    is meant."""
    lines = []
    for name, pattern, form, _, _ in DIRECTIVES:
        value = directives.get(name)
        if value is None:
            continue
        if not re.fullmatch(pattern, value, re.ASCII):
            refuse(f"--{name} {value!r}", f"it should look like {form}")
        lines.append(f"#SBATCH --{name}={value}")
    (other,) = LAUNCHERS.keys() - {launcher}
    values = {
        "login": " -l" if modules else "",  # a login shell's start-up files define `module`
        "directives": "\n".join(lines),
        "environment": _environment(modules, venv),
        "program": shlex.join(program),
        "active": LAUNCHERS[launcher][0],
        "active_line": LAUNCHERS[launcher][1].format(mpi=shlex.quote(mpi)),
        "other": f"Or instead: {LAUNCHERS[other][0]}",
        "other_line": LAUNCHERS[other][1].format(mpi=shlex.quote(mpi)),
    }
    return _Script(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def _environment(modules: Sequence[str], venv: Path | None) -> str:
    """The lines that load ``modules`` and enter ``venv``."""
    lines = [f"module load {shlex.join(modules)}"] if modules else []
    lines += [f". {shlex.quote(str(venv / 'bin/activate'))}"] if venv else []
    if lines:
        lines = ["set +u  # such scripts read variables that nobody has set", *lines, "set -u"]
    return "\n".join(lines)
