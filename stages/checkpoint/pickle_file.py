"""Weights that torch has pickled (``pytorch_model.bin``): numbers only, never code; and mapped, not read, so that a
shard takes its own tensors and no others. Imports torch when a file is opened."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from stages.checkpoint.folder import AGAIN, printable, refuse, refuse_pointer, refuse_system, said, shown
from stages.checkpoint.safetensors_file import StoredTensor

if TYPE_CHECKING:
    import torch

CONVERT = "convert to safetensors: load it in transformers and save_pretrained it"
ZIP = b"PK\x03\x04"


def read_pickle(path: Path) -> dict[str, StoredTensor]:
    """What a pickled file holds, by the names in it. Raises CheckpointError."""
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64", "int8": "I8"}
    found = {}
    for name, tensor in open_pickle(path).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        found[name] = StoredTensor(path, names.get(dtype, dtype), tuple(tensor.shape), name)
    return found


def open_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, each a window on it. Raises CheckpointError for what is not tensors by name, for a file
    that only code can unpickle, and for the format of torch before version 1.6, which cannot be mapped."""
    import torch

    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        refuse_system(path, error)
    refuse_pointer(path, start)
    if not start.startswith(ZIP):
        refuse(f"{path} is not of the format that torch writes since version 1.6", CONVERT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        needed = re.search(r"GLOBAL (\S+)", str(error))
        if needed is None:
            refuse(f"{path} has damaged pickles ({said(error)})", AGAIN)
        refuse(f"{path} needs code to be unpickled ({printable(needed[1], 60)}), and none is run", CONVERT)
    except Exception as error:  # whatever damage leads to in torch's reader
        refuse(f"{path} is cut short or damaged ({said(error)})", AGAIN)
    return _checked(path, content)


def _checked(path: Path, content: object) -> dict[str, torch.Tensor]:
    import torch

    if not isinstance(content, dict):
        refuse(f"{path} holds a {type(content).__name__} instead of tensors by name", "save the model's state_dict()")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            fix = "save the model's state_dict() alone"
            refuse(f"{path}: {shown(name)} is a {type(value).__name__} and not a tensor", fix)
        if value.layout != torch.strided or value.device.type != "cpu":
            refuse(f"{path}: tensor {printable(name, 60)} is {value.layout} on {value.device}", CONVERT)
    return content
