"""One thing goes wrong in one rank of a real job: two dozen cases in which each pair of entry, way to start, rank,
phase, kind and MPI occurs. All of them: python -m tests.faults.matrix."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.matrix import ROOT, Case, end, pairwise_cases

pytestmark = pytest.mark.slow
PYTHONS = {"openmpi": Path(sys.executable), "mpich": ROOT / ".venv-mpich" / "bin" / "python"}


@pytest.mark.parametrize(("mpi", "case"), pairwise_cases(tuple(PYTHONS)), ids=str)
def test_the_job_ends_with_the_right_code_and_one_message(mpi: str, case: Case) -> None:
    if not PYTHONS[mpi].exists():
        pytest.skip(f"there is no environment with MPICH: make MPI={mpi} venv")
    ending = end(case, str(PYTHONS[mpi]))
    assert not ending.fault(case), ending.said
