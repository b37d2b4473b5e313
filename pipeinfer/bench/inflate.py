"""The built-in target, padded with no-op weights to 100 million to a billion parameters, with the same tokens.

    python -m pipeinfer.bench.inflate 300M DIR

Every layer's MLP gets wider: the new columns of its down projection are zero, so that nothing comes of them. Further
layers are added whose output and down projections are zero: they hand on what they were given. All other new numbers
are random and of ordinary size, so the arithmetic is that of any model of this shape; the shape is unusual, for the
hidden size stays what it is, and nearly all weights are the MLPs'. Logits differ from the built-in target's in the last
bits only, for sums have another order; the built-in draft drafts for it as well.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.core.errors import PipeinferError, refuse
from stages.checkpoint.checkpoint import Checkpoint, expected_tensors
from stages.checkpoint.random_weights import random_tensor
from stages.checkpoint.spec import ModelSpec

if TYPE_CHECKING:
    import torch

LAYERS = 24
"""Enough for as many stages, and what models of this size have."""
WIDTH_STEP = 16
"""The MLP's width is a multiple of it, as kernels like it."""


def inflate(size: str, directory: str | Path) -> Path:
    """Write a target of ``size`` weights ("300M", "0.5B") in Hugging Face format to ``directory``, whole or not at all;
    one that is there already is kept. The same size gives the same files. Raises UserError."""
    place, source = Path(directory), model_directory(BUILTIN, "target")
    spec = inflated_spec(ModelSpec.read(source), size)
    if place.exists():
        if ModelSpec.read(place) != spec:
            refuse(f"{place} holds another model", "name a directory that does not exist")
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{place.name}-", dir=place.parent) as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        try:
            _write(whole, source, spec)
            whole.rename(place)
        except OSError as error:
            refuse(f"{place} cannot be written ({error.strerror})", "name one where there is room for it")
    return place


def inflated_spec(spec: ModelSpec, size: str) -> ModelSpec:
    """``spec``, grown to about ``size`` weights. Raises UserError for a size that is none, or too small."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([MB])", size)
    if not found:
        refuse(f"{size!r} is no size of a model", "say for instance 300M or 1B")
    weights = float(found[1]) * {"M": 1e6, "B": 1e9}[found[2]]
    narrow = replace(spec, layer_count=LAYERS)
    step = replace(narrow, intermediate_size=spec.intermediate_size + WIDTH_STEP)
    steps = round((weights - weight_count(narrow)) / (weight_count(step) - weight_count(narrow)))
    if steps < 0:
        refuse(f"{size} is too small", f"use at least {weight_count(narrow) / 1e6:.0f}M")
    return replace(narrow, intermediate_size=spec.intermediate_size + steps * WIDTH_STEP)


def weight_count(spec: ModelSpec) -> int:
    """Weights of the model, zeros included."""
    return sum(math.prod(shape) for shape in expected_tensors(spec).values())


def _write(folder: Path, source: Path, spec: ModelSpec) -> None:
    """The model in ``folder``, grown from the one in ``source``."""
    from safetensors.torch import save_file

    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": spec.layer_count, "intermediate_size": spec.intermediate_size}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(dict(_grown(Checkpoint(source), spec)), folder / "model.safetensors", metadata={"format": "pt"})


def _grown(checkpoint: Checkpoint, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model, the stored one in its corner where there is one."""
    import torch

    for name, shape in expected_tensors(spec).items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor = torch.zeros(shape, dtype=torch.bfloat16)  # what they give is added to the hidden state
        else:
            tensor = random_tensor(name, shape, torch.bfloat16)
        if name in checkpoint.tensors:
            stored = checkpoint.read([name], torch.bfloat16)[name]
            tensor[tuple(map(slice, stored.shape))] = stored
        yield name, tensor


def main() -> int:
    """Write the target that the command line asks for, and say what it is."""
    parser = argparse.ArgumentParser(prog="python -m pipeinfer.bench.inflate", description=inflate.__doc__)
    parser.add_argument("size", help="weights, for instance 300M or 1B")
    parser.add_argument("directory", help="where to write it")
    args = parser.parse_args()
    try:
        spec = ModelSpec.read(inflate(args.size, args.directory))
    except PipeinferError as error:
        print(f"pipeinfer.bench.inflate: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.directory}: {weight_count(spec) / 1e6:.0f}M weights, {spec.layer_count} layers")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
