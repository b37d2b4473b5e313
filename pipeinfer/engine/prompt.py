"""What programs pass as a prompt: text, or token ids in any of the forms in which libraries hand them over."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from pipeinfer.core.errors import refuse

Prompt = str | Iterable[int] | Mapping[str, Any]
"""Text; or ids in a sequence, a NumPy array, a tensor; or what transformers' tokenizers return."""
FIX = "give text, or one sequence of token ids"


def token_ids(prompt: object, vocab_size: int) -> list[int]:
    """The ids in ``prompt``, which is not text: each at least 0 and below ``vocab_size``. Raises UserError where it
    holds anything else."""
    if isinstance(prompt, Mapping) or hasattr(prompt, "input_ids"):
        try:
            prompt = prompt["input_ids"]  # type: ignore[index]
        except (KeyError, TypeError):
            refuse("the prompt is a mapping without input_ids", FIX)
    if isinstance(prompt, bytes | bytearray):
        refuse("the prompt is bytes", "decode it to text first: prompt.decode()")
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    try:
        found = list(prompt)  # type: ignore[call-overload]
        if len(found) == 1 and isinstance(found[0], list | tuple):
            found = list(found[0])  # a batch of one
        if found and isinstance(found[0], list | tuple):
            refuse(f"{len(found)} prompts at once", "submit them one by one; they queue")
        tokens = [operator.index(token) for token in found]
    except TypeError:
        refuse(f"the prompt is {type(prompt).__name__}, not token ids", FIX)
    for token in tokens:
        if not 0 <= token < vocab_size:
            refuse(f"token {token} in the prompt: the target knows 0 to {vocab_size - 1}", "is it another tokenizer's?")
    return tokens
