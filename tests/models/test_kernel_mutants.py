"""The tests of bits notice planted faults: each is a library built from changed sources."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.kernels.library import Library, library
from tests.models.expert_bits import draw_expert_world
from tests.models.kernel_bits import check_world
from tests.models.kernel_mutants import (
    COMPILER,
    EXPERTS,
    FOLD,
    QUANTIZED,
    RACES,
    SUMS,
    WORLDS,
    Builder,
    KernelMutant,
    caught,
    opened_at,
)
from tests.models.quantized_worlds import draw_quantized_world
from tests.mpi.matrix import FULL

SOUND = library()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SOUND is None, reason="there is no library of kernels"),
    pytest.mark.skipif(COMPILER is None, reason="there is no C compiler"),
    pytest.mark.skipif(SOUND is not None and "avx2" not in SOUND.available, reason="the mutants are of AVX2"),
]
RACING = ((3, 100), (8, 100), (2, 100), (8, 0))
"""Threads, and how long they spin, in which a race is looked for."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def sound(builder: Builder) -> Library:
    return opened_at(builder.build())


def sample(mutants: list[KernelMutant]) -> list[KernelMutant]:
    """Each takes a compiler some seconds: every sixth, or all with PIPEINFER_MATRIX=full."""
    return mutants if FULL else mutants[::6]


@pytest.mark.parametrize("mutant", sample(SUMS), ids=lambda mutant: mutant.name)
def test_a_sum_that_depends_on_company_is_noticed(mutant: KernelMutant, builder: Builder) -> None:
    worlds = range(mutant.first, mutant.first + WORLDS)
    assert caught(opened_at(builder.build(mutant)), worlds=worlds), "no row had other bits"


@pytest.mark.parametrize("mutant", sample(EXPERTS), ids=lambda mutant: mutant.name)
def test_experts_that_depend_on_company_are_noticed(mutant: KernelMutant, builder: Builder) -> None:
    assert caught(opened_at(builder.build(mutant)), draw=draw_expert_world), "no row had other bits"


@pytest.mark.parametrize("mutant", sample(QUANTIZED), ids=lambda mutant: mutant.name)
def test_wrong_numbers_of_quantised_weights_are_noticed(
    mutant: KernelMutant, builder: Builder, sound: Library
) -> None:
    assert caught(opened_at(builder.build(mutant)), sound, draw=draw_quantized_world), "no row had other bits"


def test_a_sum_that_depends_on_the_instruction_set_is_noticed(builder: Builder, sound: Library) -> None:
    lib = opened_at(builder.build(FOLD))
    assert not caught(lib, worlds=range(3)), "its own bits are the same in any company"
    assert caught(lib, sound)


def test_another_build_has_the_same_bits(sound: Library) -> None:
    """However much the compiler optimises; also those of the best instruction set of the library in use."""
    for seed in range(6):
        check_world(seed, 6, sound, sound)
        check_world(seed, 6, SOUND, sound)
        check_world(seed, 6, SOUND, sound, draw_expert_world)
        check_world(seed, 6, SOUND, sound, draw_quantized_world)


def passes(path: Path, threads: int, spin_us: int) -> bool:
    """Whether two thousand passes of the library at ``path`` are right."""
    program = [sys.executable, "-m", "tests.models.kernel_passes", path, str(threads), str(spin_us), "2000"]
    try:
        done = subprocess.run(program, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    except subprocess.TimeoutExpired:
        return False
    return (done.returncode, done.stdout) == (0, "different: 0\n")


@pytest.mark.parametrize("mutant", RACES, ids=lambda mutant: mutant.name)
def test_threads_that_come_at_the_wrong_time_are_noticed(mutant: KernelMutant, builder: Builder) -> None:
    path = builder.build(mutant)
    assert any(not passes(path, *how) for _ in range(3) for how in RACING), "no pass had other bits"


def test_that_program_notices_nothing_without_a_fault(builder: Builder, sound: Library) -> None:
    assert passes(builder.folder / "sound.so", *RACING[0])
