"""A pair made on the spot: the same files every time, whole or none, and a draft that is the target's beginning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeinfer import Engine
from pipeinfer.bench.inflate import weight_count
from pipeinfer.bench.shaped_pair import DRAFT_LAYERS, PROMPT, SPEC, Facts, make_pair
from pipeinfer.core.errors import UserError
from stages.checkpoint.checkpoint import Checkpoint
from stages.checkpoint.spec import ModelSpec

TINY = replace(
    SPEC,
    layer_count=6,
    hidden_size=128,
    intermediate_size=256,
    head_count=4,
    kv_head_count=2,
    head_dim=32,
    vocab_size=2500,
)
TOKENS = 96


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Facts]:
    place = tmp_path_factory.mktemp("shaped") / "pair"
    return place, make_pair(place, TINY, 2, TOKENS)


def test_the_sizes_are_those_of_the_name() -> None:
    assert weight_count(SPEC) == pytest.approx(620e6, rel=0.01)
    assert weight_count(replace(SPEC, layer_count=DRAFT_LAYERS)) == pytest.approx(99e6, rel=0.01)


def test_the_draft_agrees_as_often_as_it_should_and_the_text_does_not_repeat(made: tuple[Path, Facts]) -> None:
    _, facts = made
    assert 0.6 < facts.agreement < 0.9
    assert facts.distinct > 0.7
    assert 0.0 < facts.factor < 1.0


def test_our_engine_finds_the_same_agreement(made: tuple[Path, Facts]) -> None:
    place, facts = made
    text: list[list[int]] = []
    for name in ("target", "draft"):
        with Engine(place / name, dtype="fp32") as engine:
            assert engine is not None
            prompts = [PROMPT] if name == "target" else [PROMPT + text[0][:index] for index in range(TOKENS)]
            count = TOKENS if name == "target" else 1
            text += [engine.generate(prompt, count, ignore_eos=True).tokens for prompt in prompts]
    guesses = [tokens[0] for tokens in text[1:]]
    agreed = sum(guess == token for guess, token in zip(guesses, text[0], strict=True))
    assert agreed / TOKENS == pytest.approx(facts.agreement)


def test_the_draft_is_the_targets_beginning(made: tuple[Path, Facts]) -> None:
    place, _ = made
    target, draft = (Checkpoint(place / name) for name in ("target", "draft"))
    for part, checkpoint, layers in (("target", target, 6), ("draft", draft, 2)):
        spec = ModelSpec.read(place / part)
        assert spec == replace(TINY, layer_count=layers)
        checkpoint.validate(spec)
    for name in draft.tensors:
        both = [checkpoint.read([name], torch.bfloat16)[name] for checkpoint in (target, draft)]
        assert torch.equal(*both)


def test_the_same_files_again_and_another_folder_is_left_alone(made: tuple[Path, Facts], tmp_path: Path) -> None:
    place, facts = made
    assert make_pair(tmp_path / "again", TINY, 2, TOKENS) == facts
    files = [path.relative_to(place) for path in place.rglob("*") if path.is_file()]
    assert len(files) == 11
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (place / file).read_bytes()
    assert json.loads((place / "pair.json").read_text())["tokens"] == TOKENS
    assert make_pair(place, TINY, 2, TOKENS) == facts
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="no such pair"):
        make_pair(tmp_path / "other", TINY, 2, TOKENS)
    with pytest.raises(UserError, match="no such pair"):
        make_pair(place, replace(TINY, layer_count=5), 2, TOKENS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]
