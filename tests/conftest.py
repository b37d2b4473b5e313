"""What every test may rely on: one thread per process, no network, and how hard Hypothesis tries."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is loaded. Ranks run so as well: on one thread the same row gives the same bits in most batch sizes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")  # ranks that wait inside Open MPI leave the cores to others
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PIPEINFER_CACHE"] = "off"  # each job measures for itself

# What a shell starts in the background ignores Ctrl-C, and so would all programs that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Deadlines measure the neighbours on a shared machine; `timeout` in pyproject.toml is what catches a hang.
settings.register_profile("full", deadline=None, print_blob=True)
settings.register_profile("fast", deadline=None, print_blob=True, max_examples=15)
settings.load_profile("full")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the tests for mpiexec to mpiexec: importing them would make this process an MPI job of its own."""
    return True if collection_path.name == "under_mpirun" and not config.getoption("--with-mpi") else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, those in tests/mpi before all: short ones fill all cores at the end. And let the whole programs
    in tests/mpi run: pytest-mpi takes the folder's name for its mark and would skip them."""
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, "mpi" not in item.path.parts))
    for item in items:
        if item.get_closest_marker("mpi") is None:
            item.own_markers = [mark for mark in item.own_markers if "--with-mpi" not in str(mark.kwargs.get("reason"))]
