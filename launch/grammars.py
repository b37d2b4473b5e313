"""The grammars of a job's target, for the ranks that choose tokens and for the head, which checks what is asked."""

from __future__ import annotations

from pathlib import Path

from pipeinfer.core.errors import UserError
from pipeinfer.text import Text, tokenizer_folder
from stages.checkpoint.spec import ModelSpec
from stages.models.generic_spec import GenericSpec
from stages.models.grammar import Grammars


def grammars_of(directory: Path, spec: ModelSpec | GenericSpec) -> Grammars:
    """The grammars of the target in ``directory``. Nothing is read yet."""

    def find_ends() -> frozenset[int]:
        try:
            return frozenset(spec.eos_tokens) | Text(directory).eos_tokens
        except UserError:  # this host has no tokenizer; the head has one
            return frozenset(spec.eos_tokens)

    return Grammars(directory, spec.vocab_size, find_ends, lambda: tokenizer_folder(directory))
