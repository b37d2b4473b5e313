"""Text to tokens and back, with the checkpoint's own tokenizer. Loads no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
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

    eos_tokens: frozenset[int] = frozenset()
    def special_stop(self, text): return None
    def reader(self, silent: frozenset[int], stops: Sequence[str], prompt=()) -> Reader:
        """A fresh reader of one answer."""
        return Reader(self.stream(), silent, stops)


class Numbers(Text):
    """For answers that mean nothing, which are shown as their tokens' numbers. A prompt is read by the tokenizer in
    ``directory``; where there is none, its tokens are its bytes."""

    def __init__(self, directory: Path) -> None:
        self._reads_bytes = not has_tokenizer(directory)
        if not self._reads_bytes:
            super().__init__(directory)

    def encode(self, text: str) -> list[int]:
        """See Text."""
        return list(text.encode()) if self._reads_bytes else super().encode(text)

    def encode_chat(self, text: str) -> list[int]:
        """See Text."""
        if self._reads_bytes:
            refuse("a chat template needs a tokenizer", "leave out --chat")
        return super().encode_chat(text)

    def decode(self, tokens: list[int]) -> str:
        """The numbers, with blanks between them."""
        return " ".join(map(str, tokens))


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


class StopStrings:
    """Lets text through up to the first of the strings ``stops``. Holds back what may yet turn out to be the beginning
    of one: always less than the longest of them."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=1)
        self._held = ""
        self.is_reached = False

    def push(self, text: str) -> str:
        """What can be shown now that ``text`` has come; nothing any more once a stop string is reached."""
        if self.is_reached:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.is_reached = True
            return self._let_go(min(places))
        for place in range(max(0, len(self._held) - self._longest + 1), len(self._held)):
            if any(stop.startswith(self._held[place:]) for stop in self._stops):
                return self._let_go(place)
        return self._let_go(len(self._held))

    def _let_go(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown

    def close(self) -> str:
        """What was held back for nothing."""
        return "" if self.is_reached else self._let_go(len(self._held))


class Reader:
    """Reads an answer up to the token that completes one of the strings ``stops``. Tokens in ``silent`` are no text.

    It takes tokens one by one, so that where an answer ends does not depend on how they arrived."""

    def __init__(self, stream: TextStream, silent: frozenset[int], stops: Sequence[str]) -> None:
        self._stream = stream
        self._silent = silent
        self._filter = StopStrings(stops)
        self.shown = ""  # the text so far

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._filter.is_reached

    def read(self, tokens: Sequence[int]) -> tuple[int, str]:
        """How many of ``tokens`` belong to the answer, and what can be shown now that they have come."""
        piece, count = "", 0
        for token in tokens:
            if self.is_stopped:
                break
            count += 1
            if token not in self._silent:
                piece += self._filter.push(self._stream.push([token]))
        self.shown += piece
        return count, piece

    def close(self) -> str:
        """What is left when no more tokens will come."""
        piece = self._filter.push(self._stream.close()) + self._filter.close()
        self.shown += piece
        return piece


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer comes with the model."""
    return (directory / "tokenizer.json").is_file()


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
