"""Quantised matrices of checkpoints: one shape of each format. tests/models/quantized_bits.py has all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.packed_tensors import CASES
from tests.models.quantized_bits import check


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_the_definition(tmp_path: Path, name: str) -> None:
    check(tmp_path, name, (21, 136), seed=len(name), is_thorough=False)
