"""The config of a model, from its directory or its GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.checkpoint.folder import is_gguf_name, read_config
from stages.checkpoint.gguf_config import gguf_config


def model_config(model: str | Path) -> tuple[Path, dict[str, Any]]:
    """The path and the content of the config.json in the directory ``model``; of a GGUF file, what its metadata say.
    Raises CheckpointError."""
    return (Path(model), gguf_config(model)) if is_gguf_name(model) else read_config(model)
