"""Text to tokens and back, with the checkpoint's own tokenizer. Loads no model."""

from __future__ import annotations

import json
from pathlib import Path

from pipeinfer.errors import CheckpointError, refuse


class Text:
    """The tokenizer in ``directory`` (its ``tokenizer.json``)."""

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer

        self._directory = directory
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{directory} has no tokenizer.json; save the model with its fast tokenizer")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from error

    def encode(self, text: str) -> list[int]:
        """The tokens of ``text``, with whatever the tokenizer puts before them."""
        return list(self._tokenizer.encode(text).ids)

    def encode_chat(self, text: str) -> list[int]:
        """The tokens of one user turn under the tokenizer's chat template, up to where the assistant answers."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._directory, local_files_only=True)
        if not tokenizer.chat_template:
            refuse(f"the tokenizer in {self._directory} has no chat template", "leave out --chat")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        return list(self._tokenizer.encode(prompt, add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """The text of ``tokens``, special tokens left out."""
        return str(self._tokenizer.decode(tokens))

    def stream(self) -> TextStream:
        """A fresh decoder for tokens that come a few at a time."""
        return TextStream(self)


class TextStream:
    """Turns tokens to text as they come; holds back bytes that are not yet a whole character.

    It decodes from the last place where the text was whole, so its cost does not grow with the text."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._tokens: list[int] = []
        self._anchor = 0  # tokens before it have been shown and serve as context only
        self._shown = 0

    def push(self, tokens: list[int]) -> str:
        """What can be shown now that ``tokens`` have come."""
        self._tokens += tokens
        before = self._text.decode(self._tokens[self._anchor : self._shown])
        after = self._text.decode(self._tokens[self._anchor :])
        if after.endswith("\N{REPLACEMENT CHARACTER}") or len(after) <= len(before):
            return ""
        self._anchor, self._shown = self._shown, len(self._tokens)
        return after[len(before) :]

    def close(self) -> str:
        """What is left, whole or not."""
        before = self._text.decode(self._tokens[self._anchor : self._shown])
        return self._text.decode(self._tokens[self._anchor :])[len(before) :]


def vocabulary(directory: Path) -> dict[str, int]:
    """The tokenizer's tokens and their numbers."""
    path = directory / "tokenizer.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        tokens = stored["model"]["vocab"]
        found = dict(tokens) if isinstance(tokens, dict) else {entry[0]: index for index, entry in enumerate(tokens)}
        found.update((entry["content"], entry["id"]) for entry in stored.get("added_tokens", ()))
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no tokenizer.json; save the model with its fast tokenizer") from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy it again") from error
    return found
