"""A directory with the tokenizer of a GGUF file, for libraries that read directories.

It is made when it is first needed, in the place for temporary files, and goes when the process ends.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

from pipeinfer.text.gguf_tokenizer import has_vocabulary, refuse_foreign, tokenizer_of
from stages.checkpoint.folder import is_gguf_name
from stages.checkpoint.gguf_file import read_gguf

CONFIG = {"model_type": "llama"}
"""A config.json by which transformers takes tokenizer.json as it is."""


def refuse_foreign_tokenizer(model: Path) -> None:
    """Raise CheckpointError if ``model`` is a GGUF file whose tokenizer is of a kind or a name that is not known; by
    its header alone."""
    if is_gguf_name(model):
        refuse_foreign(read_gguf(model))


def tokenizer_folder(model: Path) -> Path:
    """Where the tokenizer's files are of the model in the directory or the GGUF file ``model``. Raises CheckpointError
    for a file whose tokenizer cannot be had."""
    if not is_gguf_name(model):
        return model
    file = read_gguf(model)
    if not has_vocabulary(file):
        return model  # which has no files: whoever looks for them says so
    return Path(_made(file.path, file.state).name) / file.path.name


@functools.cache
def _made(path: Path, _state: tuple[int, int]) -> tempfile.TemporaryDirectory[str]:
    """Files of the tokenizer, in a folder that has the name of the file ``path``."""
    tokenizer, config = tokenizer_of(read_gguf(path))
    place = tempfile.TemporaryDirectory(prefix="pipeinfer-tokenizer-")
    folder = Path(place.name) / path.name
    folder.mkdir()
    for name, content in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config), ("config.json", CONFIG)):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return place
