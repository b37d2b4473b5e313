"""Tensors by the names that the model's code gives them, whatever a training program put before them.

torch.compile, data parallelism and sharded training wrap a model, and each wrapper leaves a part in every name. Whoever
saves the base model alone leaves one out. The rule is applied once, where the headers have been read.
"""

from __future__ import annotations

from collections.abc import Iterable

from stages.checkpoint.folder import printable, refuse

ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # a wrapper of the model or of a layer
FIRST = "module"  # of the whole model
BASE = "model."
IN_BASE = ("embed_tokens.", "layers.", "norm.")


def unwrapped(name: str) -> str:
    """``name`` without what wrappers added to it."""
    parts = [part for part in name.split(".") if part not in ANYWHERE]
    while parts[:1] == [FIRST]:
        parts = parts[1:]
    return ".".join(parts)


def llama_name(name: str) -> str:
    """The unwrapped name, as the Llama family has it for causal language models."""
    name = unwrapped(name)
    return BASE + name if name.startswith(IN_BASE) else name


def refuse_collisions(where: object, pairs: Iterable[tuple[str, str]]) -> None:
    """``pairs``: stored names, and what each one means. Raises CheckpointError where two mean the same."""
    first: dict[str, str] = {}
    for stored, meant in pairs:
        if meant in first:
            two = f"{printable(first[meant], 60)} and {printable(stored, 60)}"
            refuse(f"{where}: tensors {two} both mean {printable(meant, 60)}", "keep one of them")
        first[meant] = stored
