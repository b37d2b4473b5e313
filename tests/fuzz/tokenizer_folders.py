"""Random folders with a tokenizer in them: as people have them, as nobody should have them, and damaged."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.fuzz.sentencepiece_model import write_model

LETTERS = "abhelot .?!,'nsmvérw☃\n"
WORDS = [
    "he", "hello", "ll", "lo", "n't", "'s", " '", "☃", "é", "tool", "the", ".", "?", "  ", " ", "a", "l", "\n\n",
    "do not", " n", "'t", "'", "'ve",
]  # fmt: skip
ADDED = [
    "<s>", "</s>", "<|im_end|>", "<0x41>", "he", " x", "é", "▁tool", "n't", " .", "[UNK]", "##s", "a</w>", "☃☃", "Ā",
]  # fmt: skip
PLAIN = ["PreTrainedTokenizerFast", "TokenizersBackend"]
CLASSES = [
    "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "T5Tokenizer",
    "BertTokenizer", "CodeGenTokenizer", "CTRLTokenizer", "NoSuch", None,
]  # fmt: skip
TYPES = ["llama", "llama", "llama", "mistral", "qwen2", "qwen3", "gpt2", "gemma", "no-such"]
TEMPLATES: list[Any] = [
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}{{ 'he' if add_generation_prompt }}",
    "{{ bos_token }}{{ messages[0]['content'] | trim }}{{ eos_token }}",
    "{{ raise_exception('a system message\nis needed first') }}",
    "{% for m in messages %}{{ m.content }",
    "{{ messages[0].content.text.strip() }}",
    "{{ messages[1].content + 1 }}",
    "{% include 'other' %}",
    [{"name": "tool_use", "template": "{{ messages[0].content }}"}],
    [{"name": "default", "template": "{{ messages[0].content }}"}, {"name": "rag", "template": "x"}],
    {"default": "{{ messages[0].content }}"}, "", None, "{{ ''.__class__.__mro__ }}",
]  # fmt: skip


def some(dice: random.Random, things: list[Any], most: int) -> list[Any]:
    return dice.sample(things, dice.randint(0, min(most, len(things))))


def text(dice: random.Random) -> str:
    """Text of a few characters, words and added tokens."""
    parts = [*LETTERS, *WORDS, *ADDED, "\N{GRINNING FACE}", "\0"]
    return "".join(dice.choice(parts) for _ in range(dice.randint(0, 14)))


def _merges(dice: random.Random, vocabulary: dict[str, int], count: int) -> list[tuple[str, str]]:
    """Random pairs of what is there, each in the vocabulary from then on."""
    pairs = []
    for _ in range(count):
        pair = (dice.choice(list(vocabulary)), dice.choice(list(vocabulary)))
        if "".join(pair) not in vocabulary and not any("<" in half for half in pair):
            vocabulary["".join(pair)] = len(vocabulary)
            pairs.append(pair)
    return pairs


def byte_level(dice: random.Random) -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen."""
    vocabulary = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = _merges(dice, vocabulary, dice.randint(0, 40))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=dice.random() < 0.3)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback(dice: random.Random) -> Tokenizer:
    """As Llama 2, Mistral and Gemma."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS.replace(" ", ""), "▁he", "▁t", "llo"]
    vocabulary = {name: n for n, name in enumerate(dict.fromkeys(names))}
    merges = _merges(dice, vocabulary, dice.randint(0, 40))
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts[: dice.choice([3, 4, 4])])
    return tokenizer


def unigram(dice: random.Random) -> Tokenizer:
    """As T5 and XGLM."""
    has_bytes = dice.random() < 0.5
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256) if has_bytes), "▁", *LETTERS]
    names += [f"▁{word}" for word in WORDS]
    pieces = [(name, -dice.random() * 9) for name in dict.fromkeys(names)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=has_bytes))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=dice.choice(["always", "never", "first"]))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=dice.choice(["always", "never", "first"]))
    return tokenizer


def word_level(dice: random.Random) -> Tokenizer:
    """Whole words; half of the time nothing for those that are not known."""
    names = dict.fromkeys([*("[UNK]" for _ in range(dice.randint(0, 1))), *WORDS, *LETTERS])
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def word_piece(dice: random.Random) -> Tokenizer:
    """As BERT."""
    names = dict.fromkeys(["[UNK]", *WORDS, *LETTERS, *(f"##{letter}" for letter in [*LETTERS, *WORDS])])
    tokenizer = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=dice.random() < 0.5)
    return tokenizer


def _decoder(dice: random.Random) -> Any:
    """One part of a decoder."""
    pattern, content = dice.choice(["▁", "l", " .", "☃", Regex("l+"), Regex("^h")]), dice.choice([" ", "", "xy", "l"])
    return dice.choice([
        lambda: decoders.Replace(pattern, content),
        decoders.ByteFallback,
        decoders.Fuse,
        lambda: decoders.Strip(dice.choice([" ", "l", "▁"]), dice.randint(0, 2), dice.randint(0, 2)),
        lambda: decoders.Metaspace(prepend_scheme=dice.choice(["always", "never", "first"])),
        lambda: decoders.WordPiece(prefix=dice.choice(["##", "l", "▁"]), cleanup=dice.random() < 0.5),
        lambda: decoders.BPEDecoder(suffix=dice.choice(["</w>", "l", ""])),
        lambda: decoders.CTC(pad_token=dice.choice(["<pad>", "l", "<s>"]), cleanup=dice.random() < 0.5),
        decoders.ByteLevel,
    ])()  # fmt: skip


def _vary(dice: random.Random, tokenizer: Tokenizer) -> None:
    """Change any part of a tokenizer now and then."""
    if dice.random() < 0.4:
        parts = [_decoder(dice) for _ in range(dice.randint(0, 3))]
        if dice.random() < 0.4:
            parts.insert(0, decoders.Fuse())
        tokenizer.decoder = None if not parts else parts[0] if len(parts) == 1 else decoders.Sequence(parts)
    if dice.random() < 0.2:
        tokenizer.normalizer = dice.choice([
            normalizers.NFKC, normalizers.Lowercase, normalizers.Strip, lambda: normalizers.Replace("l", "é"),
            lambda: normalizers.Prepend("▁"),
        ])()  # fmt: skip
    if dice.random() < 0.2:
        tokenizer.pre_tokenizer = dice.choice([
            pre_tokenizers.Whitespace, pre_tokenizers.Punctuation, pre_tokenizers.Digits, pre_tokenizers.ByteLevel,
            lambda: pre_tokenizers.Split(Regex("l|o"), "isolated"), pre_tokenizers.Metaspace,
        ])()  # fmt: skip
    for content in some(dice, ADDED, 5):
        flags = {name: dice.random() < 0.3 for name in ("lstrip", "rstrip", "single_word", "normalized")}
        token = AddedToken(content, **flags)
        (tokenizer.add_special_tokens if dice.random() < 0.6 else tokenizer.add_tokens)([token])
    known = tokenizer.get_vocab()
    if "<s>" in known and dice.random() < 0.6:
        pairs = [(name, known[name]) for name in ("<s>", "</s>") if name in known]
        single = " ".join([pairs[0][0], "$A", *(name for name, _ in pairs[1:])])
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)
    elif dice.random() < 0.2:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if dice.random() < 0.2:
        tokenizer.enable_truncation(max_length=dice.randint(2, 8))
    if dice.random() < 0.2:
        tokenizer.enable_padding(length=dice.choice([None, 9]), pad_token=dice.choice(["<pad>", "</s>"]))


def _config(dice: random.Random, tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json: half of the time what agrees with the tokenizer, else more or other."""
    added = dict(sorted(tokenizer.get_added_tokens_decoder().items()))
    special = [token.content for token in added.values() if token.special]
    entries = {str(number): token.__getstate__() for number, token in added.items()}
    config: dict[str, Any] = {"tokenizer_class": dice.choice(PLAIN), "model_max_length": 64}
    for name in some(dice, ["bos_token", "eos_token", "pad_token", "unk_token", "tool_token"], 3):
        config[name] = dice.choice(special) if special else None
    if dice.random() < 0.3:
        config["added_tokens_decoder"] = entries
    _add(dice, config, 0.3, {"chat_template": TEMPLATES, "clean_up_tokenization_spaces": [True, True, False]})
    if dice.random() < 0.5:
        return config
    if dice.random() < 0.5:
        config["tokenizer_class"] = dice.choice(CLASSES)
    for name in some(dice, ["bos_token", "eos_token", "pad_token", "unk_token"], 3):
        content = dice.choice([*ADDED, "<new>"])
        config[name] = content if dice.random() < 0.9 else {"__type": "AddedToken", "content": content, "special": True}
    if dice.random() < 0.2:
        number = dice.choice([tokenizer.get_vocab_size(), 0, 5])
        late = AddedToken("<late>", special=dice.random() < 0.5).__getstate__()
        config["added_tokens_decoder"] = entries | {str(number): late}
    more: dict[str, list[Any]] = {
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": [True],
        "additional_special_tokens": [special, [], ["<more>"]],
        "extra_special_tokens": [special, {"image_token": "<image>"}],
    }
    flags = ("add_bos_token", "add_eos_token", "split_special_tokens", "legacy", "add_prefix_space")
    _add(dice, config, 0.15, more | {name: [True, False] for name in flags})
    wrong = {"padding_side": ["middle"], "tokenizer_class": [7], "added_tokens_decoder": [{"0": "x"}], "eos_token": [3]}
    _add(dice, config, 0.02, wrong | {"extra_special_tokens": ["x"], "chat_template": [7, [7]]})
    return config


def _add(dice: random.Random, config: dict[str, Any], share: float, choices: dict[str, list[Any]]) -> None:
    config |= {name: dice.choice(values) for name, values in choices.items() if dice.random() < share}


def _damage(dice: random.Random, path: Path) -> None:
    """Spoil one file."""
    content = path.read_bytes()
    place = dice.randrange(len(content))
    path.write_bytes(dice.choice([
        content[:place], b"", b"\xff\xfe" + content, b"[]", b"7", b"null", b"{}",
        content[:place] + bytes([dice.randrange(256)]) + content[place + 1 :],
        content[:place] + content[place + dice.randint(1, 40) :],
    ]))  # fmt: skip


def make_folder(dice: random.Random, folder: Path) -> None:
    """Write a random tokenizer, with the files beside it that decide how it is read."""
    tokenizer = dice.choice([byte_level, byte_fallback, unigram, word_level, word_piece])(dice)
    _vary(dice, tokenizer)
    config = _config(dice, tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    files: dict[str, Any] = {"config.json": {"model_type": dice.choice(TYPES), "architectures": ["LlamaForCausalLM"]}}
    if dice.random() < 0.9:
        files["tokenizer_config.json"] = config
    if dice.random() < 0.1:
        files["added_tokens.json"] = {"<|im_start|>": tokenizer.get_vocab_size()}
    if dice.random() < 0.1:
        begin = {"content": "<s>", "lstrip": True}
        files["special_tokens_map.json"] = {"eos_token": dice.choice(ADDED), "bos_token": begin}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    template = dice.choice(TEMPLATES)
    if isinstance(template, str) and dice.random() < 0.1:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if dice.random() < 0.08 and isinstance(tokenizer.model, models.BPE):
        (folder / "tokenizer.json").unlink()
        tokenizer.model.save(str(folder))
    elif dice.random() < 0.08:
        (folder / "tokenizer.json").unlink()
        write_model(dice, folder / "tokenizer.model")
    if dice.random() < 0.12:
        _damage(dice, dice.choice(sorted(path for path in folder.iterdir() if path.stat().st_size)))
