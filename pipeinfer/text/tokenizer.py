"""A model's tokenizer as its files are: the tokens are those of transformers' AutoTokenizer.

Its import takes seconds. So where the files leave it nothing to add to tokenizer.json, the ``tokenizers`` library reads
that alone.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from pipeinfer.errors import CheckpointError, UserError, refuse
from pipeinfer.text.decoding import Chain, chain

MAIN = "tokenizer.json"
CONFIG = "tokenizer_config.json"
MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tiktoken.model")
VOCABULARIES = ("vocab.json", "vocab.txt", "tekken.json")
EXTRAS = ("added_tokens.json", "special_tokens_map.json")

# What tokenizer_config.json and config.json may say without AutoTokenizer making anything of it that is not in
# tokenizer.json; tests/fuzz/tokenizers.py compares.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
PLAIN_TYPES = ("llama", "mistral", "qwen3", "gpt2")  # of others, transformers may replace the class
WITHOUT_EFFECT = {
    "add_bos_token", "add_eos_token", "backend", "chat_template", "model_max_length", "name_or_path", "padding_side",
    "tokenizer_class", "truncation_side",
}  # fmt: skip
MOST_REASON = 240  # characters of another library's message


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer comes with the model."""
    return any((directory / name).is_file() for name in (MAIN, *MODELS, *VOCABULARIES))


def one_line(error: BaseException) -> str:
    """What ``error`` says, in one line of bounded length."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= MOST_REASON else said[: MOST_REASON - 3] + "..."


@contextmanager
def blaming(thing: str, fix: str) -> Iterator[None]:
    """Turn whatever a library raises inside into one UserError: ``thing``, the reason, ``fix``."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise UserError(f"{thing} ({one_line(error)}); {fix}") from error


def is_failure(error: BaseException) -> bool:
    """Whether a library failed, rather than somebody asking this process to end. Where the tokenizers library panics,
    it raises what is not an Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class Tokenizer:
    """The tokens and the text of one model's tokenizer."""

    eos_token: int | None

    def encode(self, text: str, is_bare: bool = False) -> list[int]:
        """The tokens of ``text``; ``is_bare``: without what the tokenizer adds at the ends."""
        raise NotImplementedError

    def decode(self, tokens: list[int]) -> str:
        """The text of ``tokens``, special tokens left out."""
        raise NotImplementedError

    def vocabulary(self) -> dict[str, int]:
        """All tokens, added ones included, and their numbers."""
        raise NotImplementedError

    def special(self) -> dict[str, int]:
        """The tokens that are left out of text."""
        raise NotImplementedError

    def chain(self) -> Chain | None:
        """A fresh decoder for one text as its tokens come; None: only the whole can be decoded."""
        raise NotImplementedError

    def name(self, token: int) -> str | None:
        """What the chain decodes for ``token``; None: it is no text."""
        raise NotImplementedError


@dataclass
class Plain(Tokenizer):
    """tokenizer.json alone, by the tokenizers library."""

    library: Any
    eos_token: int | None
    clean_up: Any = None

    def encode(self, text: str, is_bare: bool = False) -> list[int]:
        """See Tokenizer."""
        return list(self.library.encode(text, add_special_tokens=not is_bare).ids)

    def decode(self, tokens: list[int]) -> str:
        """See Tokenizer."""
        return str(self.library.decode(tokens)) if self._is_any_text(tokens) else ""

    def vocabulary(self) -> dict[str, int]:
        """See Tokenizer."""
        return dict(self.library.get_vocab())

    @cached_property
    def _special(self) -> dict[str, int]:
        added = self.library.get_added_tokens_decoder().items()
        return {token.content: number for number, token in added if token.special}

    def special(self) -> dict[str, int]:
        """See Tokenizer."""
        return self._special

    def chain(self) -> Chain | None:
        """See Tokenizer."""
        decoder = self.library.decoder
        return chain(None if decoder is None else json.loads(decoder.__getstate__()), self.clean_up)

    def _is_any_text(self, tokens: list[int]) -> bool:
        """Whether there is anything to decode; some decoders fail where there is not."""
        return any(self.name(token) is not None for token in tokens)

    def name(self, token: int) -> str | None:
        """See Tokenizer."""
        string: str | None = self.library.id_to_token(token)
        return None if string in self._special else string


class Full(Plain):
    """What AutoTokenizer makes of all the files."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import PreTrainedTokenizerBase, TokenizersBackend

        self.tokenizer = tokenizer
        kind, base = type(tokenizer), TokenizersBackend
        # A class with a decoding of its own, or without the library, can only be asked for whole texts.
        self.is_opaque = not isinstance(tokenizer, base) or (
            kind._decode is not base._decode
            or kind.decode is not PreTrainedTokenizerBase.decode
            or kind.clean_up_tokenization is not PreTrainedTokenizerBase.clean_up_tokenization
        )
        super().__init__(None if self.is_opaque else tokenizer.backend_tokenizer, tokenizer.eos_token_id)
        if not self.is_opaque and tokenizer.clean_up_tokenization_spaces and not _is_bpe(tokenizer):
            self.clean_up = tokenizer.clean_up_tokenization

    def encode(self, text: str, is_bare: bool = False) -> list[int]:
        """See Tokenizer."""
        return list(self.tokenizer(text, add_special_tokens=not is_bare, verbose=False)["input_ids"])

    def decode(self, tokens: list[int]) -> str:
        """See Tokenizer."""
        if self.is_opaque:
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        if not self._is_any_text(tokens):
            return ""
        cleans = self.clean_up is not None
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=cleans))

    def vocabulary(self) -> dict[str, int]:
        """See Tokenizer."""
        return dict(self.tokenizer.get_vocab())

    def special(self) -> dict[str, int]:
        """See Tokenizer."""
        if not self.is_opaque:
            return super().special()
        return dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True))

    def chain(self) -> Chain | None:
        """See Tokenizer."""
        return None if self.is_opaque else super().chain()


def _is_bpe(tokenizer: Any) -> bool:
    """Whether transformers leaves out the cleaning that the tokenizer asks for."""
    forced = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return type(tokenizer.backend_tokenizer.model).__name__ == "BPE" and not forced


def open_tokenizer(directory: Path) -> Tokenizer:
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
        _explain(directory, error)
    _refuse_unread(directory, tokenizer)
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

    path = directory / MAIN
    try:
        config, model = _object(directory / CONFIG), _object(directory / "config.json")
    except (OSError, ValueError):
        return None
    if not path.is_file() or config.get("tokenizer_class") not in PLAIN_CLASSES:
        return None
    if model.get("model_type") not in PLAIN_TYPES or (directory / "tekken.json").exists():
        return None
    if "added_tokens_decoder" not in config and any((directory / name).exists() for name in EXTRAS):
        return None
    try:
        library = Library.from_file(str(path))
    except BaseException as error:
        if not is_failure(error):
            raise
        _explain(directory, error)
    padding = library.padding or {}
    if not _adds_nothing(library, config | {"left_pad_token": padding.get("pad_token")}):
        return None
    library.no_truncation()
    library.no_padding()
    return Plain(library, library.token_to_id(config["eos_token"]) if config.get("eos_token") else None)


def _adds_nothing(library: Any, config: dict[str, Any]) -> bool:
    """Whether tokenizer_config.json says nothing about the tokens that ``library`` does not know."""
    added = {number: token.__getstate__() for number, token in library.get_added_tokens_decoder().items()}
    special = {token["content"] for token in added.values() if token["special"]}
    for key, value in config.items():
        match key:
            case "added_tokens_decoder":
                is_known = value == {str(number): token for number, token in added.items()}
            case "additional_special_tokens" | "extra_special_tokens":
                is_known = isinstance(value, list) and all(isinstance(one, str) and one in special for one in value)
            case "clean_up_tokenization_spaces":
                is_known = value is False or (value is True and type(library.model).__name__ == "BPE")
            case _ if key in WITHOUT_EFFECT:
                is_known = True
            case _ if key.endswith("_token"):
                is_known = value is None or (isinstance(value, str) and value in special)
            case _:
                is_known = False
        if not is_known:
            return False
    return True


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises OSError or ValueError."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


def _explain(directory: Path, error: BaseException) -> NoReturn:
    """Raise a CheckpointError that names the file to blame for ``error``."""
    for name in ("config.json", CONFIG, *EXTRAS, MAIN, "vocab.json"):
        try:
            _object(directory / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as reason:
            raise CheckpointError(f"{directory / name} cannot be read ({one_line(reason)}); copy it again") from error
    if "trust_remote_code" in str(error):
        thing, fix = f"{directory / CONFIG}: this tokenizer needs program code of its own", "no such code is ever run"
    elif (directory / MAIN).is_file():
        thing, fix = f"{_to_blame(directory)} cannot be used ({one_line(error)})", "copy it again"
    elif (directory / "vocab.json").is_file() and not (directory / "merges.txt").is_file():
        thing, fix = f"{directory} has vocab.json and no merges.txt", "copy that too"
    elif "Couldn't instantiate" in str(error):  # what it goes on to say, of missing packages, is a guess
        thing, fix = f"{directory} has no {MAIN}", f"copy one, or name in {CONFIG} the tokenizer_class of what there is"
    elif "`tiktoken`" in str(error):  # what transformers tries last
        (model, *_) = (directory / name for name in MODELS if (directory / name).is_file())
        thing, fix = f"{model} is no SentencePiece model that can be read", f"copy it again, or add a {MAIN}"
    else:
        thing, fix = f"the tokenizer in {directory} cannot be loaded ({one_line(error)})", "copy its files again"
    raise CheckpointError(f"{thing}; {fix}") from error


def _to_blame(directory: Path) -> Path:
    """The file with which transformers could not use tokenizer.json."""
    from tokenizers import Tokenizer as Library

    try:
        Library.from_file(str(directory / MAIN))
    except BaseException as error:
        if not is_failure(error):
            raise
        return directory / MAIN
    return directory / (CONFIG if (directory / CONFIG).is_file() else MAIN)


def _refuse_unread(directory: Path, tokenizer: Any) -> None:
    """Refuse a tokenizer that was made without a file it wants: transformers then makes up a tiny vocabulary."""
    wanted = {key: name for key, name in type(tokenizer).vocab_files_names.items() if name}
    if (directory / wanted.pop("tokenizer_file", MAIN)).is_file():
        return
    missing = [name for name in wanted.values() if not (directory / name).is_file()]
    taken = getattr(tokenizer, "vocab_file", None)
    if missing and not (taken and Path(taken).is_file() and "merges_file" not in wanted):
        raise CheckpointError(
            f"{directory} lacks {' and '.join(missing)}, which its tokenizer ({type(tokenizer).__name__}) is made of; "
            "copy it there, or name the right tokenizer_class in tokenizer_config.json"
        )


def same_tokens(one: Path, other: Path) -> bool:
    """Whether the files of two tokenizers say without loading them that all tokens are the same."""
    names = (MAIN, *MODELS, *VOCABULARIES, "merges.txt", *EXTRAS)
    return all(_bytes(one / name) == _bytes(other / name) for name in names) and _saying(one) == _saying(other)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _saying(directory: Path) -> object:
    """What is said about a tokenizer's tokens outside of its own files."""
    try:
        config, model = _object(directory / CONFIG), _object(directory / "config.json")
    except (OSError, ValueError):
        return _bytes(directory / CONFIG), _bytes(directory / "config.json")
    said = {key: value for key, value in config.items() if key not in WITHOUT_EFFECT - {"tokenizer_class"}}
    return said, model.get("model_type"), model.get("tokenizer_class")


def refuse_no_template(directory: Path) -> None:
    """Refuse what certainly has no chat template, without loading anything."""
    places = (directory / "chat_template.jinja", directory / "additional_chat_templates")
    try:
        has_any = any(place.exists() for place in places) or bool(_object(directory / CONFIG).get("chat_template"))
    except FileNotFoundError:
        has_any = False
    except (OSError, ValueError):
        return
    if not has_any:
        refuse(f"the tokenizer in {directory} has no chat template", "leave out --chat")


def render_chat(directory: Path, tokenizer: Any, text: str) -> str:
    """The prompt that ``tokenizer``'s chat template makes of one user turn, up to where the assistant answers."""
    path = directory / ("chat_template.jinja" if (directory / "chat_template.jinja").is_file() else CONFIG)
    if not tokenizer.chat_template:
        refuse(f"the tokenizer in {directory} has no chat template", "leave out --chat")
    if not isinstance(tokenizer.chat_template, str | dict):
        refuse(f"{path}: the chat template is no template but {tokenizer.chat_template!r:.40}", "leave out --chat")
    turns = [{"role": "user", "content": text}]
    with blaming(f"{path}: the chat template cannot be used", "mend it, or leave out --chat"), quietly():
        return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
