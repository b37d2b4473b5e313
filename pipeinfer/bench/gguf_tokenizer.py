"""The tokenizer of a model as the metadata of a GGUF file: GPT-2's byte-level BPE, from tokenizer.json.

llama.cpp splits text by the name of a pre-tokenizer instead of by its description, so a tokenizer that splits otherwise
than GPT-2's is refused. Ids of the model that the tokenizer does not have are tokens without a text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeinfer.core.errors import refuse
from stages.checkpoint.spec import ModelSpec

NAME = "tokenizer.json"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""GGUF's types of tokens: from the vocabulary, special, added but not special, and without a text."""
BLANK = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
"""What byte-level BPE writes for a blank."""
GPT2_SPLIT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def describe_tokenizer(writer: Any, model: Path, spec: ModelSpec) -> None:
    """Write the tokenizer in the directory ``model`` to the GGUFWriter ``writer``. Raises UserError for one that
    llama.cpp would apply otherwise."""
    read = read_tokenizer(model)
    refuse_unlike_gpt2(model, read)
    texts, types = tokens_of(read, spec.vocab_size)
    if len(texts) > spec.vocab_size:
        refuse(f"{model / NAME} has more tokens than the model", "use the tokenizer that belongs to the model")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in read["model"]["merges"]])
    writer.add_add_bos_token(False)
    if spec.eos_tokens:
        writer.add_eos_token_id(spec.eos_tokens[0])
    bos = json.loads((model / "config.json").read_text(encoding="utf-8")).get("bos_token_id")
    if isinstance(bos, int):
        writer.add_bos_token_id(bos)


def read_tokenizer(model: Path) -> dict[str, Any]:
    """What tokenizer.json in the directory ``model`` says. Raises UserError where there is none."""
    path = model / NAME
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        refuse(f"{path} cannot be read ({error})", "use a model with a tokenizer.json")
    if not isinstance(read, dict) or not isinstance(read.get("model"), dict):
        refuse(f"{path} is no tokenizer", "use a model with a tokenizer.json")
    return read


def refuse_unlike_gpt2(model: Path, read: dict[str, Any]) -> None:
    """Raise UserError unless the tokenizer ``read`` from ``model`` is byte-level BPE that splits text as GPT-2's does
    and adds nothing to it."""
    split = read.get("pre_tokenizer") or {}
    after = (read.get("post_processor") or {"type": "ByteLevel"}).get("type")
    is_alike = (
        read["model"].get("type") == "BPE"
        and not read["model"].get("byte_fallback")
        and not read["model"].get("ignore_merges")
        and read.get("normalizer") is None
        and all(split.get(key) == value for key, value in GPT2_SPLIT.items())
        and after == "ByteLevel"
    )
    if not is_alike:
        refuse(f"{model / NAME} does not split text as GPT-2's tokenizer does", "export without a tokenizer")


def tokens_of(read: dict[str, Any], count: int) -> tuple[list[str], list[int]]:
    """Text and type of each token id of the tokenizer ``read``, for at least ``count`` ids."""
    found = {number: (text, NORMAL) for text, number in read["model"]["vocab"].items()}
    for added in read.get("added_tokens") or ():
        found[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    count = max(count, max(found, default=-1) + 1)
    told = [found.get(number, (f"[PAD{number}]", UNUSED)) for number in range(count)]
    return [text for text, _ in told], [kind for _, kind in told]


def with_texts(read: dict[str, Any], count: int) -> dict[str, Any]:
    """The tokenizer ``read`` with a text of its own, `` <id>``, for each of ``count`` token ids that has none. Such a
    token is never found in a text, as no merge makes it. Added tokens become entries of the vocabulary too: the
    tokenizers library numbers those that are none anew, after the vocabulary."""
    _, types = tokens_of(read, count)
    more = {f"{BLANK}<{number}>": number for number, kind in enumerate(types) if kind == UNUSED}
    more |= {added["content"]: added["id"] for added in read.get("added_tokens") or ()}
    return read | {"model": read["model"] | {"vocab": read["model"]["vocab"] | more}}
