"""The tokenizer of a GGUF file has the tokens of the tokenizer that it was made of."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pipeinfer.core.errors import CheckpointError, UserError
from pipeinfer.text import Text, has_tokenizer, same_tokens, vocabulary_of
from pipeinfer.text.gguf_pre import LLAMA3, PRE_TOKENIZERS, QWEN2
from tests.models.gguf_files import byte_level, write_gguf
from tests.models.tiny import TEXT

LETTERS = "aZ 09.,'\n\t\r_-{}()<>/ä€漢😀\u0301\u00a0ﬁÅ\u212b"
SPECIAL = ["<|begin|>", "<|end|>"]
END = "tokenizer.ggml.eos_token_id"


def texts(seed: int, count: int = 300) -> list[str]:
    """Random texts: words of TEXT, contractions, digits, blanks, and letters of all kinds."""
    dice = random.Random(seed)
    odd = ("don't", "WE'LL", "12345", "3.14", "  ", "\n\n", "\r\n", "    if", "Ünïcode", "naïve")
    words = [*TEXT.split(), *odd, *SPECIAL]
    return [
        "".join(
            dice.choice(words) + dice.choice((" ", "", "  ", "\n")) if dice.random() < 0.7 else dice.choice(LETTERS)
            for _ in range(dice.randrange(1, 12))
        )
        for _ in range(count)
    ]


def trained(pre: Any, normalizer: Any = None, **more: Any) -> Tokenizer:
    """A byte-level BPE of 600 tokens."""
    tokenizer = Tokenizer(models.BPE(**more))
    tokenizer.normalizer, tokenizer.decoder, tokenizer.pre_tokenizer = normalizer, decoders.ByteLevel(), pre
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, min_frequency=1, special_tokens=SPECIAL)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def split_by(pattern: str) -> Any:
    """The pre-tokenizer of the tokenizer.json of Llama 3 and Qwen 2, with their ``pattern``."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), letters])


def plain() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain()])


# Written out once more: what meta-llama/Llama-3 and Qwen/Qwen2 have in tokenizer.json.
OF_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt-2": (plain, None, {}),
    "smollm": (digits, None, {}),
    "llama-bpe": (lambda: split_by(OF_LLAMA3), None, {"ignore_merges": True}),
    "smaug-bpe": (lambda: split_by(OF_LLAMA3), None, {}),
    "qwen2": (lambda: split_by(OF_LLAMA3.replace("{1,3}", "")), normalizers.NFC(), {}),
}


def written(path: Path, metadata: dict[str, Any]) -> Path:
    """A file that has a tokenizer and no model."""
    return write_gguf(path, {"general.architecture": "llama", **metadata}, {})


@pytest.mark.parametrize("pre", list(CASES))
def test_byte_level_tokens_are_the_originals(pre: str, tmp_path: Path) -> None:
    make, normalizer, more = CASES[pre]
    original = trained(make(), normalizer, **more)
    if pre == "llama-bpe":  # whose files need not say that a text begins with the first token
        begin = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
        original.post_processor = begin
    read = json.loads(original.to_str())
    metadata = byte_level(read, pre) | {"tokenizer.ggml.bos_token_id": 0, END: 1}
    text = Text(written(tmp_path / "model.gguf", metadata))
    assert text.eos_tokens == {1} and text.vocabulary() == original.get_vocab()
    for one in texts(seed=1):
        tokens = original.encode(one).ids
        assert text.encode(one) == tokens, f"seed 1, {one!r}"
        assert text.decode(tokens) == original.decode(tokens), f"seed 1, {one!r}"


def test_patterns_are_those_of_the_models() -> None:
    assert LLAMA3 == OF_LLAMA3 and OF_LLAMA3.replace("{1,3}", "") == QWEN2
    for pre in PRE_TOKENIZERS.values():
        for pattern in pre.patterns:
            Regex(pattern)


@pytest.fixture(scope="module")
def llama_like() -> tuple[bytes, dict[str, Any]]:
    """A SentencePiece model, and the metadata that a converter makes of it."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=content, vocab_size=500, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    read = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
    kinds = [2 if read.is_unknown(n) else 3 if read.is_control(n) else 6 if read.is_byte(n) else 1
             for n in range(read.vocab_size())]  # fmt: skip
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [read.id_to_piece(n) for n in range(read.vocab_size())],
        "tokenizer.ggml.scores": [float(read.get_score(n)) for n in range(read.vocab_size())],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
    }  # fmt: skip
    return content.getvalue(), metadata


def test_sentencepiece_tokens_are_the_originals(llama_like: tuple[bytes, dict[str, Any]], tmp_path: Path) -> None:
    proto, metadata = llama_like
    original = sentencepiece.SentencePieceProcessor(model_proto=proto)
    text = Text(written(tmp_path / "model.gguf", metadata))
    assert text.eos_tokens == {2}
    for one in texts(seed=2):
        if any(name in one for name in SPECIAL):
            continue
        tokens = [1, *original.encode(one)]
        assert text.encode(one) == tokens, f"seed 2, {one!r}"
        assert text.decode(tokens) == original.decode(tokens), f"seed 2, {one!r}"


def test_a_file_streams_as_it_decodes(llama_like: tuple[bytes, dict[str, Any]], tmp_path: Path) -> None:
    text = Text(written(tmp_path / "model.gguf", llama_like[1]))
    for one in texts(seed=3, count=40):
        tokens = text.encode(one)
        reader = text.reader(frozenset(), ())
        assert "".join([*(reader.read([token])[1] for token in tokens), reader.close()]) == text.decode(tokens), one


def test_chat_template_and_special_tokens(tmp_path: Path) -> None:
    template = "{% for message in messages %}<|begin|>{{ message.role }}: {{ message.content }}<|end|>{% endfor %}"
    metadata = byte_level(json.loads(trained(plain()).to_str()), "gpt-2") | {END: 1}
    path = written(tmp_path / "model.gguf", metadata | {"tokenizer.chat_template": template})
    text = Text(path)
    tokens = text.encode_chat("hello")
    assert tokens[0] == 0 and tokens[-1] == 1 and text.decode(tokens) == "user: hello"
    assert text.special_stop("<|end|>") == 1
    with pytest.raises(UserError, match="no chat template"):
        Text(written(tmp_path / "bare.gguf", metadata)).encode_chat("hello")


def test_tokens_that_fill_the_matrix_are_none(tmp_path: Path) -> None:
    metadata = byte_level(json.loads(trained(plain()).to_str()), "gpt-2")
    names, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    longer = {"tokenizer.ggml.tokens": [*names, f"[PAD{len(names)}]"], "tokenizer.ggml.token_type": [*kinds, 5]}
    whole = written(tmp_path / "model.gguf", metadata), written(tmp_path / "longer.gguf", metadata | longer)
    assert vocabulary_of(whole[0]) == vocabulary_of(whole[1]) == Text(whole[1]).vocabulary()
    assert same_tokens(*whole)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tokenizer.ggml.model": "bert"}, r"tokenizer bert is not supported .*; give .* --tokenizer DIR"),
        ({"tokenizer.ggml.pre": "poro-chat"}, r"pre-tokenizer poro-chat is not known .*; give .* --tokenizer DIR"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "merges has 'a b c', which merges no tokens"),
        ({"tokenizer.ggml.merges": ["q \u0120\u0120"]}, "which merges no tokens"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type has 2 values for 600 tokens"),
        ({"tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens has no texts"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens has no texts"),
        ({"tokenizer.ggml.tokens": "x"}, "tokenizer.ggml.tokens must be an array, not 'x'"),
        ({"tokenizer.ggml.model": "llama"}, "scores has 0 values for 600 tokens"),
        ({END: 600}, "eos_token_id is 600, of 600 tokens"),
    ],
)
def test_what_cannot_be_meant_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    metadata = byte_level(json.loads(trained(plain()).to_str()), "gpt-2")
    path = written(tmp_path / "model.gguf", metadata | change)
    with pytest.raises(CheckpointError, match=says) as caught:
        Text(path)
    assert "\n" not in str(caught.value)


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", {"tokenizer.ggml.model": "no_vocab"})
    assert not has_tokenizer(path)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        Text(path)
