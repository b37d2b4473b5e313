"""What was learnt of a pair's probabilities, stored: a JSON file with a calibration for each source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeinfer.core.errors import refuse
from pipeinfer.core.files import write_whole
from speculation.trees.calibration import Calibration

FORMAT = 1


def read_calibrations(path: str | Path) -> dict[str, dict[str, Any]]:
    """The words of each source's calibration in the file at ``path``. Raises UserError for a file that holds none."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        if stored["format"] != FORMAT:
            raise ValueError(f"format {stored['format']}, known is {FORMAT}")
        return {name: Calibration.from_words(words).to_words() for name, words in stored["calibrations"].items()}
    except OSError as error:
        refuse(f"{path} cannot be read ({error.strerror})", "name a file that `pipeinfer calibrate` wrote")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        refuse(f"{path} holds no calibration ({error})", "make it again with `pipeinfer calibrate`")


def write_calibrations(
    path: str | Path, calibrations: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]
) -> None:
    """Write them to ``path``, whole or not at all, with ``about``: what they were learnt from. Raises UserError."""
    write_whole(path, json.dumps({"format": FORMAT, **about, "calibrations": calibrations}, indent=2) + "\n")
