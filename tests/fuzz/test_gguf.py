"""A short run of the fuzz of GGUF files; see tests/fuzz/gguf.py for a long one."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.gguf import run


def test_damaged_files(tmp_path: Path) -> None:
    ends, faults = run(17, range(100), tmp_path)
    assert not faults, "\n\n".join(faults)
    assert ends["read"] > 20 and ends["refused"] > 20, ends
