"""The files of suites, hardware, model shapes and baselines: in benchmarks/, beside the packages."""

from __future__ import annotations

from pathlib import Path

from pipeinfer.core.errors import refuse

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def find(kind: str, name: str) -> Path:
    """The file ``name``, or ``name``.toml of benchmarks/``kind``. Raises UserError, which lists the known names."""
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return path
    path = BENCHMARKS / kind / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (BENCHMARKS / kind).glob("*.toml")))
        refuse(f"there is no {name} in benchmarks/{kind}", f"name a file, or one of {known}")
    return path
