"""Tokenizers as they are on disk: the tokens are those of transformers' AutoTokenizer, or one line says why not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, processors

from pipeinfer.core.errors import CheckpointError, UserError
from pipeinfer.text import Numbers, Text, has_tokenizer, same_tokens
from pipeinfer.text.tokenizer import Plain
from tests.fuzz.sentencepiece_model import write_model
from tests.fuzz.tokenizers import reference
from tests.models.tiny import END_OF_TEXT, make_tokenizer

SAID = "The ferry <|im_start|>leaves the north pier at seven"
Edit = Callable[[Path], object]


def config(**more: Any) -> Edit:
    """An edit of tokenizer_config.json."""

    def edit(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    return edit


def library(change: Callable[[Tokenizer], object]) -> Edit:
    """An edit of tokenizer.json."""

    def edit(folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(folder / "tokenizer.json"))

    return edit


def file(name: str, content: Any) -> Edit:
    return lambda folder: (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def begin(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens(["<s>"])
    special = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)


def merges_alone(folder: Path) -> None:
    Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    (folder / "tokenizer.json").unlink()
    config(tokenizer_class="GPT2Tokenizer")(folder)


def sentencepiece(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    write_model(random.Random(1), folder / "tokenizer.model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path)
    file("config.json", {"model_type": "llama"})(tmp_path)
    return tmp_path


def added(content: str) -> dict[str, Any]:
    return dict(AddedToken(content, special=True).__getstate__())


@pytest.mark.parametrize(
    "edits",
    [
        [library(lambda tokenizer: tokenizer.enable_truncation(max_length=8))],
        [library(lambda tokenizer: tokenizer.enable_padding(length=64, pad_token=END_OF_TEXT))],
        [library(lambda tokenizer: tokenizer.enable_padding(pad_to_multiple_of=32, pad_token="<pad>"))],
        [library(begin), config(bos_token="<s>", add_bos_token=False)],
        [library(lambda tokenizer: tokenizer.add_special_tokens(["<s>"])), config(bos_token="<s>", add_bos_token=True)],
        [config(added_tokens_decoder={"0": added(END_OF_TEXT), "512": added("<|im_start|>")})],
        [file("added_tokens.json", {"<|im_start|>": 512})],
        [file("special_tokens_map.json", {"bos_token": "<|im_start|>"})],
        [config(extra_special_tokens=["<|im_start|>"])],
        [config(tokenizer_class="Qwen2Tokenizer")],
        [file("config.json", {"model_type": "qwen2"})],
        [file("config.json", "{")],
        [merges_alone],
        [sentencepiece],
    ],
    ids=[
        "truncates", "pads", "pads-to-a-multiple", "begins", "begins-by-config", "added-by-config", "added-by-file",
        "mapped", "extra", "class", "type", "no-config", "merges", "sentencepiece",
    ],
)  # fmt: skip
def test_tokens_are_those_of_transformers(folder: Path, edits: list[Edit]) -> None:
    for edit in edits:
        edit(folder)
    wanted = reference(folder)
    if wanted is None:
        with pytest.raises(CheckpointError, match=r"config\.json"):
            Text(folder)
        return
    text = Text(folder)
    assert text.encode(SAID) == wanted(SAID)["input_ids"]
    assert text.vocabulary() == wanted.get_vocab()


@pytest.mark.parametrize("kind", [Text, Numbers])
def test_what_is_no_text_cannot_be_a_prompt(folder: Path, kind: type[Text]) -> None:
    with pytest.raises(UserError, match=r"no character \('\\udc80'\)"):
        kind(folder).encode("a\udc80")


def test_the_usual_files_are_read_without_transformers(folder: Path) -> None:
    assert type(Text(folder)._tokenizer) is Plain


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (file("tokenizer.json", "{"), ["tokenizer.json", "column 2"]),
        (file("tokenizer.json", "[]"), ["tokenizer.json"]),
        (file("tokenizer_config.json", "7"), ["tokenizer_config.json", "no JSON object"]),
        (file("tokenizer_config.json", "[" * 100_000), ["tokenizer_config.json", "too deeply"]),
        (config(padding_side="up", truncation=7, tokenizer_class="X"), ["tokenizer_config.json", "Padding side"]),
        (config(tokenizer_class=7), ["tokenizer_config.json"]),
        (config(tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]}), ["code of its own", "ever run"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["has no tokenizer"]),
        (lambda folder: (sentencepiece(folder), file("tokenizer.model", "x")(folder)), ["tokenizer.model"]),
        (lambda folder: (merges_alone(folder), (folder / "merges.txt").unlink()), ["merges.txt"]),
        (lambda folder: (merges_alone(folder), config(tokenizer_class=None)(folder)), ["tokenizer_class"]),
        (lambda folder: (sentencepiece(folder), file("config.json", {"model_type": "gpt2"})(folder)), ["vocab.json"]),
    ],
    ids=[
        "damaged", "a-list", "no-object", "deep", "side", "class", "code", "none", "model", "no-merges", "no-class",
        "other",
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_is_one_line_that_names_the_file(folder: Path, edit: Edit, says: list[str]) -> None:
    edit(folder)
    with pytest.raises(CheckpointError) as caught:
        Text(folder)
    assert str(caught.value).isprintable()
    assert [word for word in says if word not in str(caught.value)] == []


def test_code_in_a_model_s_folder_is_not_run(folder: Path) -> None:
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    config(tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})(folder)
    file("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})(folder)
    with pytest.raises(CheckpointError):
        Text(folder)
    assert not (folder / "ran").exists()


# Special tokens.


def test_the_tokenizer_says_what_ends_a_turn(folder: Path) -> None:
    library(lambda tokenizer: tokenizer.add_special_tokens(["<|im_end|>"]))(folder)
    config(eos_token="<|im_end|>")(folder)
    assert Text(folder).eos_tokens == {512}
    config(eos_token=None)(folder)
    assert Text(folder).eos_tokens == frozenset()


def test_a_stop_string_may_be_a_special_token_but_not_contain_one(folder: Path) -> None:
    library(lambda tokenizer: (tokenizer.add_special_tokens(["<|im_end|>"]), tokenizer.add_tokens(["<tool>"])))(folder)
    text = Text(folder)
    assert [text.special_stop(stop) for stop in ("<|im_end|>", END_OF_TEXT, "<tool>", "im_end")] == [512, 0, None, None]
    with pytest.raises(UserError, match=r"contains the special token '<\|im_end\|>'.*alone"):
        text.special_stop("<|im_end|>\n")


# Chat templates.

TEMPLATES = {
    "raises": ("{{ raise_exception('a system message\nis needed first') }}", "a system message is needed first"),
    "syntax": ("{% for m in messages %}{{ m.content }", "unexpected '}'"),
    "undefined": ("{{ messages[0].content.text.strip() }}", "no attribute 'text'"),
    "several": ([{"name": "tool_use", "template": "{{ messages[0].content }}"}], "tool_use"),
    "none": (7, "no template"),
    "empty": ("", "no chat template"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_that_fails_is_one_line(folder: Path, name: str) -> None:
    template, says = TEMPLATES[name]
    config(chat_template=template)(folder)
    with pytest.raises(UserError) as caught:
        Text(folder).encode_chat("hi")
    assert str(caught.value).isprintable()
    assert "chat template" in str(caught.value)
    assert says in str(caught.value)


def test_a_chat_is_what_the_template_makes_of_it(folder: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}assistant:"
    file("chat_template.jinja", template)(folder)
    text = Text(folder)
    assert text.encode_chat("hi") == text.encode(f"user: hi{END_OF_TEXT}assistant:")


# Answers to a prompt.


def answer(text: Text, tokens: list[int], prompt: list[int]) -> str:
    reader = text.reader(frozenset(), (), prompt)
    shown = "".join(reader.read([token])[1] for token in tokens) + reader.close()
    assert reader.shown == shown
    return shown


def test_the_blank_before_an_answer_s_first_word_is_part_of_it(folder: Path) -> None:
    sentencepiece(folder)
    file("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})(folder)
    text = Text(folder)
    words = text.encode("the hello")
    place = next(place for place in range(1, len(words)) if text.decode(words[:place]) == "the")
    assert answer(text, words[place:], words[:place]) == " hello"
    assert answer(text, words, []) == "the hello"


def test_numbers_are_shown_as_they_are(tmp_path: Path) -> None:
    numbers = Numbers(tmp_path)
    assert answer(numbers, [5, 17, 5], numbers.encode("hi")) == "5 17 5"


# Two tokenizers.


def test_files_say_that_two_tokenizers_are_one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    make_tokenizer(other)
    file("config.json", {"model_type": "llama", "hidden_size": 7})(other)
    config(chat_template="{{ messages }}", model_max_length=99)(other)
    assert same_tokens(folder, other)
    config(pad_token="<pad>")(other)
    assert not same_tokens(folder, other)


def test_a_folder_without_a_tokenizer_is_told_from_one_with_any(folder: Path) -> None:
    assert has_tokenizer(folder)
    merges_alone(folder)
    assert has_tokenizer(folder)
    (folder / "vocab.json").unlink()
    assert not has_tokenizer(folder)
