"""Text to tokens and back, with the model's tokenizer. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeinfer.core.errors import refuse
from pipeinfer.text.decoding import Chain, Joined
from pipeinfer.text.files import blaming, has_tokenizer, refuse_no_template, same_tokens
from pipeinfer.text.gguf_folder import refuse_foreign_tokenizer, tokenizer_folder
from pipeinfer.text.gguf_tokenizer import vocabulary
from pipeinfer.text.reader import Reader, Source, StopStrings, Streamed, Whole
from pipeinfer.text.tokenizer import Full, open_full, open_tokenizer, render_chat
from stages.checkpoint.folder import is_gguf_name
from stages.checkpoint.gguf_file import read_gguf

__all__ = [
    "Numbers",
    "Reader",
    "StopStrings",
    "Text",
    "has_tokenizer",
    "refuse_foreign_tokenizer",
    "same_tokens",
    "tokenizer_folder",
    "vocabulary_of",
]


class Text:
    """The tokenizer in ``directory``: tokenizer.json, a SentencePiece model or a vocabulary with merges; or that of a
    GGUF file. Raises CheckpointError where none can be had."""

    def __init__(self, directory: Path) -> None:
        self._directory = tokenizer_folder(directory)
        self._tokenizer = open_tokenizer(self._directory)

    @property
    def eos_tokens(self) -> frozenset[int]:
        """The tokens that end a text or a turn, as the tokenizer has it."""
        token = self._tokenizer.eos_token
        return frozenset(() if token is None else (token,))

    def vocabulary(self) -> dict[str, int]:
        """All tokens, added ones included, and their numbers."""
        return self._tokenizer.vocabulary()

    def encode(self, text: str) -> list[int]:
        """The tokens of ``text``, with whatever the tokenizer adds."""
        return self._encode(text, is_bare=False)

    def encode_chat(self, text: str) -> list[int]:
        """The tokens of one user turn; see encode_messages."""
        return self.encode_messages([{"role": "user", "content": text}])

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation under the tokenizer's chat template, up to where the assistant answers. Each
        message has a ``role`` and a ``content``."""
        for message in messages:
            _refuse_no_unicode(message["content"])
        refuse_no_template(self._directory)
        return self._encode(render_chat(self._directory, self._full, messages), is_bare=True)

    @cached_property
    def _full(self) -> Any:
        """AutoTokenizer, which alone applies chat templates."""
        mine = self._tokenizer
        return mine.tokenizer if isinstance(mine, Full) else open_full(self._directory)

    def _encode(self, text: str, is_bare: bool) -> list[int]:
        _refuse_no_unicode(text)
        with blaming(f"the tokenizer in {self._directory} cannot read the prompt", "give another"):
            return self._tokenizer.encode(text, is_bare)

    def decode(self, tokens: list[int]) -> str:
        """The text of ``tokens``, special tokens left out."""
        with self._writing():
            return self._tokenizer.decode(tokens)

    def _writing(self) -> AbstractContextManager[None]:
        return blaming(f"the tokenizer in {self._directory} cannot write such text", "copy it again")

    def special_stop(self, stop: str) -> int | None:
        """The token to stop at where ``stop`` is the name of a special token. Raises UserError where it contains one:
        special tokens are no text, so it would never be found."""
        special = self._tokenizer.special()
        if stop in special:
            return special[stop]
        for name in special:
            if name and name in stop:
                refuse(f"--stop {stop!r} contains the special token {name!r}, which is no text", f"use {name!r} alone")
        return None

    def reader(self, silent: frozenset[int], stops: Sequence[str], prompt: Sequence[int] = ()) -> Reader:
        """A fresh reader of one answer to ``prompt``: the text of both without its common prefix with the text of the
        prompt, up to the first of ``stops``. Tokens of the answer in ``silent`` are no text."""
        with self._writing():
            source = self._source(stops, prompt)
        return Reader(source, silent, self._writing)

    def _source(self, stops: Sequence[str], prompt: Sequence[int]) -> Source:
        before = self.decode(list(prompt)) if prompt else ""
        chain = self._tokenizer.chain()
        if chain is None:
            return Whole(self.decode, prompt, before, stops)
        return Streamed(chain, self._tokenizer.name, prompt, before, stops)


def _refuse_no_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        refuse(f"the prompt has what is no character ({error.object[error.start]!a})", "give it in UTF-8")


def vocabulary_of(model: Path) -> dict[str, int]:
    """All tokens and their numbers of the tokenizer in the directory or the GGUF file ``model``; what a file has is not
    made a tokenizer of. Raises CheckpointError."""
    return vocabulary(read_gguf(model)) if is_gguf_name(model) else Text(model).vocabulary()


class Numbers(Text):
    """For answers without meaning, which are shown as token ids. A prompt is read by the tokenizer in
    ``directory``; where there is none, its tokens are its bytes."""

    def __init__(self, directory: Path) -> None:
        self._reads_bytes = not has_tokenizer(directory)
        if not self._reads_bytes:
            super().__init__(directory)

    def encode(self, text: str) -> list[int]:
        """See Text."""
        _refuse_no_unicode(text)
        return list(text.encode()) if self._reads_bytes else super().encode(text)

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """See Text."""
        if self._reads_bytes:
            refuse("a chat template needs a tokenizer", "leave out --chat")
        return super().encode_messages(messages)

    def decode(self, tokens: list[int]) -> str:
        """The token ids, separated by blanks."""
        return " ".join(map(str, tokens))

    @property
    def eos_tokens(self) -> frozenset[int]:
        """None: no token ends such an answer."""
        return frozenset()

    def special_stop(self, stop: str) -> int | None:
        """None: a number is no special token."""
        return None

    def _writing(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _source(self, stops: Sequence[str], prompt: Sequence[int]) -> Source:
        return Streamed(Chain([Joined()]), str, (), "", stops)
