"""A short run of the fuzz of checkpoints; see tests/fuzz/checkpoints.py for a long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import quantized
from tests.fuzz.checkpoints import run


@pytest.mark.slow
@pytest.mark.parametrize("seed", [17])
def test_damaged_checkpoints(tmp_path: Path, seed: int) -> None:
    ends, faults = run(seed, range(120), tmp_path)
    assert not faults, "\n\n".join(faults)
    assert ends["exact"] > 20 and ends["refused"] > 20, ends


@pytest.mark.slow
def test_damaged_quantised_checkpoints(tmp_path: Path) -> None:
    ends, faults = quantized.run(5, range(30), tmp_path)
    assert not faults, "\n\n".join(faults)
    assert ends["read"] > 3 and ends["refused"] > 10, ends
