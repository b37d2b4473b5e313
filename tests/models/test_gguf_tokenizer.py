"""The tokenizer in a GGUF file is that of tokenizer.json: ids, texts, types and merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from pipeinfer.bench.gguf_export import export
from pipeinfer.bench.gguf_tokenizer import (
    CONTROL,
    NAME,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    read_tokenizer,
    refuse_unlike_gpt2,
    tokens_of,
    with_texts,
)
from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.core.errors import UserError
from tests.models.tiny import END_OF_TEXT, TEXT, VOCAB_SIZE, make_tiny

MORE = 40
ADDED = "<mark>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with more tokens than its tokenizer has, one of which is added and not special."""
    place = make_tiny(tmp_path_factory.mktemp("gguf") / "model", "LlamaForCausalLM", vocab_size=VOCAB_SIZE + MORE)
    tokenizer = Tokenizer.from_file(str(place / NAME))
    tokenizer.add_tokens([ADDED])
    tokenizer.save(str(place / NAME))
    return place


def test_the_file_has_the_tokenizer(model: Path, tmp_path: Path) -> None:
    gguf: Any = pytest.importorskip("gguf", reason="the extra peers is not installed")
    fields = gguf.GGUFReader(export(model, tmp_path / "model.gguf", with_tokenizer=True)).fields
    found = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}
    library = Tokenizer.from_file(str(model / NAME))
    assert (found["model"], found["pre"]) == ("gpt2", "gpt-2")
    assert (found["eos_token_id"], found["add_bos_token"]) == (0, False) and "bos_token_id" not in found
    assert found["tokens"][: VOCAB_SIZE + 1] == [library.id_to_token(number) for number in range(VOCAB_SIZE + 1)]
    assert len(set(found["tokens"])) == VOCAB_SIZE + MORE
    types = [CONTROL, *[NORMAL] * (VOCAB_SIZE - 1), USER_DEFINED, *[UNUSED] * (MORE - 1)]
    assert found["token_type"] == types and found["tokens"][0] == END_OF_TEXT and found["tokens"][VOCAB_SIZE] == ADDED
    assert [tuple(one.split(" ")) for one in found["merges"]] == [
        tuple(one) for one in json.loads((model / NAME).read_text())["model"]["merges"]
    ]


def test_bos_of_the_built_in_pair_is_named_but_not_added(tmp_path: Path) -> None:
    gguf: Any = pytest.importorskip("gguf", reason="the extra peers is not installed")
    fields = gguf.GGUFReader(export(model_directory(BUILTIN, "draft"), tmp_path / "f", "bf16", True)).fields
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False


def test_every_token_gets_a_text_of_its_own_and_texts_stay_the_same_tokens(model: Path) -> None:
    read, count = read_tokenizer(model), VOCAB_SIZE + MORE
    whole = with_texts(read, count)
    before, after = (Tokenizer.from_str(json.dumps(one)) for one in (read, whole))
    assert UNUSED in tokens_of(read, count)[1] and UNUSED not in tokens_of(whole, count)[1]
    said = [after.decode([number], skip_special_tokens=False) for number in range(VOCAB_SIZE + 1, count)]
    assert said == [f" <{number}>" for number in range(VOCAB_SIZE + 1, count)]
    text = TEXT + "".join(said)
    assert before.encode(text).ids == after.encode(text).ids


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"post_processor": {"type": "TemplateProcessing"}},
        {"model": {"type": "WordPiece"}},
        {"model": {"type": "BPE", "byte_fallback": True}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_llama_cpp_would_split_otherwise_is_refused(change: dict[str, Any], model: Path) -> None:
    read = read_tokenizer(model)
    refuse_unlike_gpt2(model, read)
    with pytest.raises(UserError, match="does not split text as GPT-2's"):
        refuse_unlike_gpt2(model, read | change)


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    for content in (None, "{", "[]"):
        if content is not None:
            (tmp_path / NAME).write_text(content)
        with pytest.raises(UserError, match="tokenizer.json"):
            read_tokenizer(tmp_path)
