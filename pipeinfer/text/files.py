"""The files of a tokenizer: which there are, what they say beside tokenizer.json, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pipeinfer.core.errors import CheckpointError, UserError, refuse
from pipeinfer.text.gguf_folder import tokenizer_folder
from pipeinfer.text.gguf_tokenizer import has_vocabulary
from stages.checkpoint.folder import is_gguf_name
from stages.checkpoint.gguf_file import read_gguf

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
    """Whether a tokenizer comes with the model, in its directory or its GGUF file."""
    if is_gguf_name(directory):
        return has_vocabulary(read_gguf(directory))
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
    """Whether a library failed; otherwise this process was asked to end. If the tokenizers library panics,
    it raises what is not an Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``. Raises OSError or ValueError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")
    return found


def plain_config(directory: Path) -> dict[str, Any] | None:
    """tokenizer_config.json, where it names a class that takes tokenizer.json as it is and no other file has a say."""
    try:
        config, model = read_object(directory / CONFIG), read_object(directory / "config.json")
        names = {path.name for path in directory.iterdir()}
    except (OSError, ValueError):
        return None
    is_plain = (
        MAIN in names
        and config.get("tokenizer_class") in PLAIN_CLASSES
        and model.get("model_type") in PLAIN_TYPES
        and "tekken.json" not in names
        and ("added_tokens_decoder" in config or names.isdisjoint(EXTRAS))
    )
    return config if is_plain else None


def says_no_more(library: Any, config: dict[str, Any]) -> bool:
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


def explain(directory: Path, error: BaseException) -> NoReturn:
    """Raise a CheckpointError that names the file to blame for ``error``."""
    for name in ("config.json", CONFIG, *EXTRAS, MAIN, "vocab.json"):
        try:
            read_object(directory / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as reason:
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


def refuse_unread(directory: Path, tokenizer: Any) -> None:
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


def refuse_no_template(directory: Path) -> None:
    """Refuse what certainly has no chat template, without loading anything."""
    directory = tokenizer_folder(directory)
    places = (directory / "chat_template.jinja", directory / "additional_chat_templates")
    try:
        has_any = any(place.exists() for place in places) or bool(read_object(directory / CONFIG).get("chat_template"))
    except FileNotFoundError:
        has_any = False
    except (OSError, ValueError):
        return
    if not has_any:
        refuse(f"the tokenizer in {directory} has no chat template", "leave out --chat (a server: use /v1/completions)")


def same_tokens(one: Path, other: Path) -> bool:
    """Whether the files of two tokenizers say without loading them that all tokens are the same."""
    one, other = tokenizer_folder(one), tokenizer_folder(other)
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
        config, model = read_object(directory / CONFIG), read_object(directory / "config.json")
    except (OSError, ValueError):
        return _bytes(directory / CONFIG), _bytes(directory / "config.json")
    said = {key: value for key, value in config.items() if key not in WITHOUT_EFFECT - {"tokenizer_class"}}
    return said, model.get("model_type"), model.get("tokenizer_class")
