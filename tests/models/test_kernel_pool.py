"""The threads that help with passes: the same bits however many there are and whenever they come, and no hang.

What hangs is ended by pytest's own timeout, or by that of a child process."""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stages.kernels.library import PATH, Library, library
from tests.models.kernel_passes import Passes

pytestmark = pytest.mark.skipif(library() is None, reason="there is no library of kernels")


@pytest.fixture(scope="module")
def made() -> Iterator[Passes]:
    torch.set_num_threads(1)
    lib = library()
    assert lib is not None
    before = lib.threads
    yield Passes(lib)
    lib.set_threads(before)


@pytest.mark.parametrize(("threads", "spin_us"), [(2, 100), (8, 0), (8, 100)])
def test_more_threads_than_cores(threads: int, spin_us: int, made: Passes) -> None:
    made.lib.set_threads(threads, spin_us)
    assert made.differ(700, seed=threads + spin_us) == 0


def test_threads_come_and_go_between_passes(made: Passes) -> None:
    """Also such as were never started before, and while those that must sleep still spin."""
    dice = random.Random(1)
    for step in range(300):
        made.lib.set_threads(dice.choice((1, 2, 3, 5, 9)), dice.choice((0, 100, 2000)))
        assert made.differ(dice.randint(0, 3), seed=step) == 0


def test_passes_among_other_threads_that_compute(made: Passes) -> None:
    """Every core has something else to do, so that helpers are late."""
    is_over = threading.Event()

    def disturb() -> None:
        square = torch.randn(200, 200)
        while not is_over.is_set():
            square = (square @ square).clamp(-1, 1)

    others = [threading.Thread(target=disturb) for _ in range(3)]
    for other in others:
        other.start()
    try:
        for threads in (2, 4):
            made.lib.set_threads(threads, 100)
            assert made.differ(100, seed=threads) == 0
    finally:
        is_over.set()
        for other in others:
            other.join()


def test_a_number_of_threads_below_one_is_one(made: Passes) -> None:
    made.lib.set_threads(0)
    assert made.lib.threads == 1
    assert made.differ(5) == 0


def run(*arguments: str) -> list[str]:
    """What the program of passes prints; it must end by itself and without complaint."""
    program = [sys.executable, "-X", "dev", "-m", "tests.models.kernel_passes", "-", *arguments]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("spin", ["0", "1000000"])
def test_a_process_ends_while_threads_sleep_or_spin(spin: str) -> None:
    assert run("6", spin, "20") == ["different: 0"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["alone", "threads"])
def test_a_child_process_computes_without_the_threads_of_its_parent(how: str) -> None:
    """Alone, or with threads that it asks for; its parent goes on with its own."""
    assert run("4", "100", "20", how) == ["different: 0", "child: 0", "different: 0"]


def test_several_threads_have_jobs_at_a_time() -> None:
    """Engines of one process: each computes on its own thread, and one sets how many threads help."""
    lib = library()
    assert lib is not None
    all_passes = [Passes(lib) for _ in range(3)]
    lib.set_threads(2)
    differing: list[int] = []
    threads = [
        threading.Thread(target=lambda one=one, seed=seed: differing.append(one.differ(300, seed)))
        for seed, one in enumerate(all_passes)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for count in (1, 3, 2):
            lib.set_threads(count)
        threads[0].join(0.001)
    lib.set_threads(1)
    assert differing == [0, 0, 0]


def test_the_library_may_be_opened_twice(made: Passes) -> None:
    """Then both start threads, of the same numbers."""
    made.lib.set_threads(4, 100)
    again = Library(ctypes.CDLL(str(PATH)))
    again.set_threads(4, 100)
    assert made.differ(700, seed=4) == 0
