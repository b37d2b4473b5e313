"""A pair of models as both servers want it: directories in Hugging Face layout, and the same weights as GGUF files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pipeinfer.bench.gguf_export import export
from pipeinfer.bench.gguf_tokenizer import NAME, read_tokenizer, with_texts
from pipeinfer.core.config import BUILTIN, DEFAULT_CONTEXT, model_directory
from pipeinfer.core.errors import refuse
from stages.checkpoint.spec import ModelSpec

FORMS = {"fp32": "fp32", "bf16": "fp16", "fp16": "fp16"}
"""Our dtypes as GGUF's; llama.cpp is faster with fp16 than with bf16."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Target and draft: ``directories`` and GGUF ``files``. ``dtype``: ours; ``form``: GGUF's. ``context``: tokens of a
    request at most, prompt included."""

    name: str
    directories: tuple[Path, Path]
    files: tuple[Path, Path]
    dtype: str
    form: str
    context: int


def prepare(name: str, dtype: str, form: str, context: int, place: Path) -> Pair:
    """The pair ``name``, ``builtin`` or a directory with ``target`` and ``draft`` in it, in the folder ``place``.
    ``form``: of the GGUF files, or empty (see FORMS); ``context``: or 0 for the most that both models have."""
    if dtype not in FORMS:
        refuse(f"unknown dtype {dtype!r}", f"use one of {', '.join(FORMS)}")
    form = form or FORMS[dtype]
    roles = ("target", "draft")
    found = [model_directory(BUILTIN if name == BUILTIN else str(Path(name) / role), role) for role in roles]
    most = min(DEFAULT_CONTEXT, *(ModelSpec.read(directory).context for directory in found))
    if not 0 <= context <= most:
        refuse(f"--context {context}", f"use at most {most}, as the models have")
    directories = [readable(directory, place / role) for directory, role in zip(found, roles, strict=True)]
    files = [export(directory, place / f"{directory.name}.gguf", form, True) for directory in directories]
    label = name if name == BUILTIN else Path(name).absolute().name
    return Pair(label, (directories[0], directories[1]), (files[0], files[1]), dtype, form, context or most)


def readable(directory: Path, place: Path) -> Path:
    """The model in ``directory`` in the new folder ``place``, all of it links but the tokenizer, which gets a text for
    each token of the model. A client dates tokens by their texts."""
    place.mkdir()
    for path in directory.iterdir():
        if path.name != NAME:
            (place / path.name).symlink_to(path.absolute())
    whole = with_texts(read_tokenizer(directory), ModelSpec.read(directory).vocab_size)
    (place / NAME).write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    return place
