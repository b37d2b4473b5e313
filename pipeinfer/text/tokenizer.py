"""A model's tokenizer as its files are: the tokens are those of transformers' AutoTokenizer.

Its import takes seconds. So where the files leave it nothing to add to tokenizer.json, the ``tokenizers`` library reads
that alone.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeinfer.core.errors import CheckpointError, refuse
from pipeinfer.text.decoding import Chain, chain
from pipeinfer.text.files import (
    CONFIG,
    MAIN,
    blaming,
    explain,
    has_tokenizer,
    is_failure,
    plain_config,
    refuse_unread,
    says_no_more,
)


@dataclass
class Plain:
    """A tokenizer that is in tokenizer.json alone, read by the tokenizers library."""

    library: Any
    eos_token: int | None
    clean_up: Any = None

    def encode(self, text: str, is_bare: bool = False) -> list[int]:
        """The tokens of ``text``; ``is_bare``: without what the tokenizer adds at the ends."""
        return list(self.library.encode(text, add_special_tokens=not is_bare).ids)

    def decode(self, tokens: list[int]) -> str:
        """The text of ``tokens``, special tokens left out."""
        return str(self.library.decode(tokens)) if self._is_any_text(tokens) else ""

    def vocabulary(self) -> dict[str, int]:
        """All tokens, added ones included, and their numbers."""
        return dict(self.library.get_vocab())

    @cached_property
    def _special(self) -> dict[str, int]:
        added = self.library.get_added_tokens_decoder().items()
        return {token.content: number for number, token in added if token.special}

    def special(self) -> dict[str, int]:
        """The tokens that are left out of text."""
        return self._special

    def chain(self) -> Chain | None:
        """A fresh decoder for one text as its tokens come; None: only the whole can be decoded."""
        decoder = self.library.decoder
        return chain(None if decoder is None else json.loads(decoder.__getstate__()), self.clean_up)

    def _is_any_text(self, tokens: list[int]) -> bool:
        """Whether there is anything to decode; some decoders fail where there is not."""
        return any(self.name(token) is not None for token in tokens)

    def name(self, token: int) -> str | None:
        """What the chain decodes for ``token``; None: it is no text."""
        string: str | None = self.library.id_to_token(token)
        return None if string in self._special else string


class Full(Plain):
    """What AutoTokenizer makes of all the files."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import PreTrainedTokenizerBase, TokenizersBackend

        self.tokenizer = tokenizer
        kind, base = type(tokenizer), TokenizersBackend
        # A tokenizer class with its own decoding, or without the library, decodes whole texts only.
        self.is_opaque = not isinstance(tokenizer, base) or (
            kind._decode is not base._decode
            or kind.decode is not PreTrainedTokenizerBase.decode
            or kind.clean_up_tokenization is not PreTrainedTokenizerBase.clean_up_tokenization
        )
        super().__init__(None if self.is_opaque else tokenizer.backend_tokenizer, tokenizer.eos_token_id)
        if not self.is_opaque and tokenizer.clean_up_tokenization_spaces and not _is_bpe(tokenizer):
            self.clean_up = tokenizer.clean_up_tokenization

    def encode(self, text: str, is_bare: bool = False) -> list[int]:
        """See Plain."""
        return list(self.tokenizer(text, add_special_tokens=not is_bare, verbose=False)["input_ids"])

    def decode(self, tokens: list[int]) -> str:
        """See Plain."""
        if self.is_opaque:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        if not self._is_any_text(tokens):
            return ""
        cleans = self.clean_up is not None
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=cleans))

    def vocabulary(self) -> dict[str, int]:
        """See Plain."""
        return dict(self.tokenizer.get_vocab())

    def special(self) -> dict[str, int]:
        """See Plain."""
        if not self.is_opaque:
            return super().special()
        return dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))

    def chain(self) -> Chain | None:
        """See Plain."""
        return None if self.is_opaque else super().chain()


def _is_bpe(tokenizer: Any) -> bool:
    """Whether transformers leaves out the cleaning that the tokenizer asks for."""
    forced = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return type(tokenizer.backend_tokenizer.model).__name__ == "BPE" and not forced


def open_tokenizer(directory: Path) -> Plain:
    """The tokenizer in ``directory``. Raises CheckpointError, which names the file."""
    if not has_tokenizer(directory):
        raise CheckpointError(
            f"{directory} has no tokenizer (tokenizer.json, tokenizer.model, or vocab.json and merges.txt); "
            "copy it there from where the model comes from"
        )
    return _open_plain(directory) or Full(open_full(directory))


def open_full(directory: Path) -> Any:
    """AutoTokenizer for ``directory``: it runs no code from there and fetches nothing."""
    from transformers import AutoTokenizer

    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except BaseException as error:
        if not is_failure(error):
            raise
        explain(directory, error)
    refuse_unread(directory, tokenizer)
    return tokenizer


@contextmanager
def quietly() -> Iterator[None]:
    """Keep transformers' advice off standard error: what matters is said in our own words, or is none."""
    log = logging.getLogger("transformers")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _open_plain(directory: Path) -> Plain | None:
    """tokenizer.json alone, where the other files add nothing to it."""
    from tokenizers import Tokenizer as Library

    config = plain_config(directory)
    if config is None:
        return None
    try:
        library = Library.from_file(str(directory / MAIN))
    except BaseException as error:
        if not is_failure(error):
            raise
        explain(directory, error)
    left = {"left_pad_token": library.padding["pad_token"]} if library.padding else {}  # transformers takes it over
    if not says_no_more(library, config | left):
        return None
    library.no_truncation()
    library.no_padding()
    return Plain(library, library.token_to_id(config["eos_token"]) if config.get("eos_token") else None)


def render_chat(directory: Path, tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt that ``tokenizer``'s chat template makes of ``messages`` (``role`` and ``content`` each), up to where
    the assistant answers."""
    path = directory / ("chat_template.jinja" if (directory / "chat_template.jinja").is_file() else CONFIG)
    if not tokenizer.chat_template:
        refuse(f"the tokenizer in {directory} has no chat template", "leave out --chat (a server: use /v1/completions)")
    if not isinstance(tokenizer.chat_template, str | dict):
        refuse(f"{path}: the chat template is no template but {tokenizer.chat_template!r:.40}", "leave out --chat")
    with blaming(f"{path}: the chat template cannot be used", "mend it, or leave out --chat"), quietly():
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
