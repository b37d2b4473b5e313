"""Opening a model's weights, whatever they are stored in."""

from __future__ import annotations

from pathlib import Path

from stages.checkpoint.checkpoint import Checkpoint, Weights
from stages.checkpoint.folder import is_gguf_name
from stages.checkpoint.gguf_weights import GGUFCheckpoint
from stages.checkpoint.spec import ModelSpec


def open_weights(model: str | Path, spec: ModelSpec) -> Weights:
    """The weights of the model in the directory or the GGUF file ``model``, whose spec is ``spec``; from headers, all
    tensors are there and have the right shapes. Raises CheckpointError."""
    if is_gguf_name(model):
        return GGUFCheckpoint(model, spec)
    checkpoint = Checkpoint(model)
    checkpoint.validate(spec)
    return checkpoint
