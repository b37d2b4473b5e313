"""Pre-tokenizers of byte-level BPE by the names that GGUF files have for them, as tokenizer.json describes them.

A file has the name alone. What it means is what llama.cpp does for it, which for these is what the models' own
tokenizer.json says. A name that is not here is refused: text split otherwise is other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|"
    rf"\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LINES}"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """``patterns``: regular expressions at whose matches text is split, one after the other. ``takes_whole``: whether a
    part of the text that is a token is not merged from its bytes. ``is_composed``: whether text is normalised to NFC
    first. ``adds_bos``: whether the first token is put before a text if the file does not say."""

    patterns: tuple[str, ...]
    takes_whole: bool = False
    is_composed: bool = False
    adds_bos: bool = False

    def steps(self) -> list[dict[str, Any]]:
        """The steps of tokenizer.json's Sequence."""
        splits = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in self.patterns
        ]
        letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        return [*splits, letters]


_LLAMA3 = PreTokenizer((LLAMA3,), takes_whole=True, adds_bos=True)
_GPT2 = PreTokenizer((GPT2,))
PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _GPT2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": PreTokenizer((LLAMA3,)),
    "qwen2": PreTokenizer((QWEN2,), is_composed=True),
    "deepseek-r1-qwen": PreTokenizer((QWEN2,)),
    "tekken": PreTokenizer((TEKKEN,), takes_whole=True, adds_bos=True),
    "smollm": PreTokenizer((r"\p{N}", GPT2)),
}
"""By ``tokenizer.ggml.pre``."""
