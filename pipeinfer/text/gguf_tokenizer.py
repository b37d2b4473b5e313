"""The tokenizer that a GGUF file's metadata describe, as the tokenizer.json and tokenizer_config.json of a directory.

Two kinds of the format can be had: ``gpt2`` is byte-level BPE with merges and a pre-tokenizer by name; ``llama`` is
SentencePiece BPE, whose scores say which merge comes first. Others are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from pipeinfer.core.errors import CheckpointError
from pipeinfer.text.gguf_pre import PRE_TOKENIZERS
from stages.checkpoint.folder import AGAIN, plain, refuse, shown
from stages.checkpoint.gguf_file import GGUFFile

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""GGUF's types of tokens."""
BLANK = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a blank."""
NAMED = ("bos", "eos", "pad", "unknown")
GIVE = "give a directory that has the model's tokenizer with --tokenizer DIR"
NONE = "no_vocab"


def has_vocabulary(file: GGUFFile) -> bool:
    """Whether the file has a tokenizer, of whatever kind."""
    return bool(file.metadata.get(f"{PREFIX}model", NONE) != NONE)


def vocabulary(file: GGUFFile) -> dict[str, int]:
    """The tokens and their numbers, without those that only fill up the model's matrix. Raises CheckpointError."""
    texts, kinds = _tokens(file)
    return {text: number for number, text in enumerate(texts) if not _is_filler(number, text, kinds[number])}


def tokenizer_of(file: GGUFFile) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json. Raises CheckpointError for a tokenizer that is damaged or of another
    kind."""
    kind = file.metadata.get(f"{PREFIX}model")
    if kind not in ("gpt2", "llama"):
        refuse(f"{file.path}: tokenizer {plain(kind)} is not supported (gpt2 and llama are)", GIVE)
    texts, kinds = _tokens(file)
    special = _named(file, texts)
    read = _byte_level(file, texts, kinds) if kind == "gpt2" else _sentencepiece(file, texts, kinds)
    added = [
        _added(number, text, is_special=kinds[number] in (CONTROL, UNKNOWN) or text in special.values())
        for number, text in enumerate(texts)
        if kinds[number] in (CONTROL, UNKNOWN, USER_DEFINED) or text in special.values()
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "post_processor": _ends(file, special, texts, kind == "llama"),
        **read,
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{("unk" if name == "unknown" else name) + "_token": text for name, text in special.items()},
    }
    template = file.metadata.get("tokenizer.chat_template")
    return tokenizer, config | ({"chat_template": template} if isinstance(template, str) and template else {})


def refuse_foreign(file: GGUFFile) -> None:
    """Refuse a tokenizer of a kind or with a pre-tokenizer that there is none of here, by its name alone."""
    kind = file.metadata.get(f"{PREFIX}model")
    if kind not in ("gpt2", "llama"):
        refuse(f"{file.path}: tokenizer {plain(kind)} is not supported (gpt2 and llama are)", GIVE)
    if kind == "gpt2":
        _pre_tokenizer(file)


def _tokens(file: GGUFFile) -> tuple[list[str], list[int]]:
    """Texts and types of all tokens."""
    texts = file.values(f"{PREFIX}tokens")
    if not texts or not all(isinstance(text, str) for text in texts):
        refuse(f"{file.path}: {PREFIX}tokens has no texts", AGAIN)
    kinds = file.values(f"{PREFIX}token_type") or [NORMAL] * len(texts)
    if len(kinds) != len(texts):
        _disagree(file, "token_type", len(kinds), len(texts))
    return texts, kinds


def _disagree(file: GGUFFile, key: str, count: int, tokens: int) -> NoReturn:
    refuse(f"{file.path}: {PREFIX}{key} has {count} values for {tokens} tokens", AGAIN)


def _is_filler(number: int, text: str, kind: int) -> bool:
    return kind == UNUSED and text in (f"[PAD{number}]", f"<|pad_{number}|>")


def _named(file: GGUFFile, texts: Sequence[str]) -> dict[str, str]:
    """The texts of the tokens that the metadata name."""
    found = {}
    for name in NAMED:
        token = file.metadata.get(f"{PREFIX}{name}_token_id")
        if token is None or token == 0xFFFFFFFF:
            continue
        if type(token) is not int or not 0 <= token < len(texts):
            refuse(f"{file.path}: {PREFIX}{name}_token_id is {shown(token)}, of {len(texts)} tokens", AGAIN)
        found[name] = texts[token]
    return found


def _added(number: int, text: str, is_special: bool) -> dict[str, Any]:
    return {
        "id": number,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": is_special,
    }


def _pre_tokenizer(file: GGUFFile) -> Any:
    name = file.metadata.get(f"{PREFIX}pre", "default")
    if name not in PRE_TOKENIZERS:
        able = ", ".join(PRE_TOKENIZERS)
        raise CheckpointError(f"{file.path}: pre-tokenizer {plain(name)} is not known (known are {able}); {GIVE}")
    return PRE_TOKENIZERS[name]


def _byte_level(file: GGUFFile, texts: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    """What tokenizer.json says of a GPT-2-like tokenizer."""
    pre = _pre_tokenizer(file)
    known = {text: number for number, text in enumerate(texts) if not _is_filler(number, text, kinds[number])}
    merges = [tuple(merge.split(" ")) for merge in file.values(f"{PREFIX}merges") or [] if isinstance(merge, str)]
    bad = next((merge for merge in merges if len(merge) != 2 or not {*merge, "".join(merge)} <= known.keys()), None)
    if bad is not None:
        refuse(f"{file.path}: {PREFIX}merges has {shown(' '.join(bad))}, which merges no tokens", AGAIN)
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "normalizer": {"type": "NFC"} if pre.is_composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre.steps()},
        "decoder": {**letters, "add_prefix_space": True, "use_regex": True},
        "model": _bpe(known, merges, ignore_merges=pre.takes_whole),
    }


def _bpe(known: dict[str, int], merges: Sequence[tuple[str, ...]], **more: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": known,
        "merges": [list(merge) for merge in merges],
        **more,
    }


def _sentencepiece(file: GGUFFile, texts: Sequence[str], kinds: Sequence[int]) -> dict[str, Any]:
    """What tokenizer.json says of a Llama-like tokenizer."""
    scores = file.values(f"{PREFIX}scores")
    if scores is None or len(scores) != len(texts):
        _disagree(file, "scores", len(scores or ()), len(texts))
    known = {text: number for number, text in enumerate(texts) if not _is_filler(number, text, kinds[number])}
    unknown = next((text for text, kind in zip(texts, kinds, strict=True) if kind == UNKNOWN), None)
    has_prefix = file.metadata.get(f"{PREFIX}add_space_prefix", True) is not False
    prepend = [{"type": "Prepend", "prepend": BLANK}] if has_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if has_prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    blanks = {"type": "Replace", "pattern": {"String": BLANK}, "content": " "}
    merges = merges_by_score(known, {number: scores[number] for number, kind in enumerate(kinds) if kind == NORMAL})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [blanks, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": _bpe(known, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds),
    }


def merges_by_score(known: dict[str, int], scores: dict[int, float]) -> list[tuple[str, str]]:
    """The merges that make the tokens with ``scores``, the highest score first; of one token's, by the numbers of its
    parts."""
    found: list[tuple[float, int, int, str, str]] = []
    for text, number in known.items():
        if number not in scores:
            continue
        for cut in range(1, len(text)):
            left, right = known.get(text[:cut]), known.get(text[cut:])
            if left is not None and right is not None:
                found.append((-scores[number], left, right, text[:cut], text[cut:]))
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _ends(file: GGUFFile, special: dict[str, str], texts: Sequence[str], is_llama: bool) -> dict[str, Any] | None:
    """The post-processor, which puts the first and the last token around a text where the metadata ask for them."""
    by_default = is_llama or _pre_tokenizer(file).adds_bos
    wanted = {"bos": file.metadata.get(f"{PREFIX}add_bos_token", by_default),
              "eos": file.metadata.get(f"{PREFIX}add_eos_token", False)}  # fmt: skip
    around = {name: special[name] for name, is_wanted in wanted.items() if is_wanted is True and name in special}
    if not around:
        return None
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": around[name], "type_id": 0}} if name != "text" else text
              for name in ("bos", "text", "eos") if name == "text" or name in around]  # fmt: skip
    numbers = {one: {"id": one, "ids": [texts.index(one)], "tokens": [one]} for one in around.values()}
    return {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": numbers}
