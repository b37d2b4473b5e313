"""Which tokens a grammar allows, and that no other is drawn or guessed."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.core.errors import UserError
from pipeinfer.core.grammar import OBJECT, regex_grammar, schema_grammar
from pipeinfer.core.ports import GREEDY, Sampling, SamplingInputs
from pipeinfer.text import Text
from stages.kernels.sampling import drawing_scores
from stages.kernels.top_tokens import top_tokens
from stages.models import grammar as grammar_file
from stages.models.grammar import Grammars
from stages.models.guided import GuidedShard

pytest.importorskip("llguidance", reason="the package llguidance is not installed")
DIRECTORY, VOCABULARY, END = model_directory(BUILTIN, "target"), 2048, 0
SCHEMA = schema_grammar(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"enum": [1, 22, None]}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
)
DIGITS = regex_grammar("[0-9]{1,3}")


def grammars(directory: Path = DIRECTORY) -> Grammars:
    return Grammars(directory, VOCABULARY, lambda: [END])


def tokens_of(text: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(Text(DIRECTORY).encode(text), np.int64)


def walk(known: Grammars, text: str, dice: random.Random, most: int = 60) -> list[int]:
    """A random answer, token by token."""
    tokens: list[int] = []
    while len(tokens) < most and END not in tokens:
        tokens.append(dice.choice(np.flatnonzero(known.mask(text, np.array(tokens, np.int64))).tolist()))
    return tokens


@pytest.mark.parametrize("text", [SCHEMA, DIGITS, schema_grammar(OBJECT)], ids=["schema", "pattern", "object"])
def test_a_mask_depends_on_the_tokens_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where states are forgotten, rows come in any order, and other grammars beside them."""
    monkeypatch.setattr(grammar_file, "STATES", 7)
    monkeypatch.setattr(grammar_file, "ROOTS", 1)
    monkeypatch.setattr(grammar_file, "NEAR", 3)
    seed = random.randrange(2**32)
    dice, known = random.Random(seed), grammars()
    rows = [path[:length] for path in [walk(known, text, dice) for _ in range(6)] for length in range(len(path) + 1)]
    dice.shuffle(rows)
    for row in rows:
        fresh = grammars().mask(text, np.array(row, np.int64)) if dice.random() < 0.2 else None
        found = known.mask(text, np.array(row, np.int64))
        known.mask(DIGITS if text == SCHEMA else SCHEMA, tokens_of("1")[: dice.randint(0, 1)])
        assert found.any() and found.shape == (VOCABULARY,), f"seed {seed}: {row}"
        assert fresh is None or np.array_equal(found, fresh), f"seed {seed}: {row}"
        assert len(known._states) <= 7 and len(known._roots) == 1


def test_an_answer_begins_as_the_grammar_says_and_ends_where_it_is_complete() -> None:
    known, text = grammars(), Text(DIRECTORY)
    for index in np.flatnonzero(known.mask(DIGITS, tokens_of("")[:0])):
        assert text.decode([int(index)]).isdigit()
    assert known.mask(DIGITS, tokens_of("1"))[[END, *tokens_of("2")]].all()
    for done in ("123", '{"name": "a", "n": 22}'):
        answer = DIGITS if done == "123" else SCHEMA
        assert np.flatnonzero(known.mask(answer, tokens_of(done))).tolist() == [END]


def test_any_token_that_ends_a_text_ends_an_answer() -> None:
    (other,) = tokens_of("x")
    known = Grammars(DIRECTORY, VOCABULARY, lambda: [int(other), END])
    assert not known.mask(DIGITS, tokens_of("")[:0])[[END, other]].any()
    assert known.mask(DIGITS, tokens_of("1"))[[END, other]].all()
    for text in ("123", "1x"):
        assert np.flatnonzero(known.mask(DIGITS, tokens_of(text))).tolist() == [END, other]


def test_what_contradicts_the_grammar_can_only_end() -> None:
    known = grammars()
    for tokens in (tokens_of("x"), tokens_of("1x"), np.array([-3]), np.array([VOCABULARY + 5]), np.array([END, END])):
        assert np.flatnonzero(known.mask(DIGITS, tokens)).tolist() == [END]
        assert np.flatnonzero(known.mask(DIGITS, np.append(tokens, tokens_of("1")))).tolist() == [END]
    assert np.flatnonzero(known.mask("{}", tokens_of("1"))).tolist() == [END]  # nobody checked it


def test_what_cannot_be_followed_is_refused() -> None:
    known = grammars()
    known.check(SCHEMA)
    known.check(DIGITS)
    bad = [schema_grammar(schema) for schema in ({"type": "nonsense"}, {"uniqueItems": True})]
    for text in ("{}", regex_grammar("(a"), *bad):
        with pytest.raises(UserError, match="llguidance refuses the grammar"):
            known.check(text)


def test_a_model_that_cannot_be_guided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a grammar needs .*tokenizer.json"):
        grammars(tmp_path).check(DIGITS)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="llguidance cannot use .*tokenizer.json"):
        grammars(tmp_path).check(DIGITS)
    with pytest.raises(UserError, match="no token that ends a text"):
        Grammars(DIRECTORY, VOCABULARY, lambda: [VOCABULARY]).check(DIGITS)


def test_without_the_package_a_grammar_is_refused_and_a_rank_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"needs the package llguidance; pip install 'pipeinfer\[guidance\]'"):
        grammars().check(DIGITS)
    known = grammars()
    for text in ("", "1"):
        assert np.flatnonzero(known.mask(DIGITS, tokens_of(text))).tolist() == [END]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("pipeinfer: a grammar needs the package llguidance; pip install 'pipeinfer[guidance]'")


SAMPLINGS = (
    GREEDY,
    Sampling(1.0, seed=5),
    Sampling(0.7, 3, 0.9, 0.05, 1.3, 9, 0.5, -0.5),
    Sampling(1.0, top_p=0.01, logit_bias=((7, 100.0),)),
)


@pytest.mark.parametrize("is_guess", [False, True])
def test_no_other_token_is_drawn_or_guessed(is_guess: bool) -> None:
    """Beside rows without a grammar, which are drawn as if alone."""
    seed = random.randrange(2**32)
    logits = torch.randn(12, 200, generator=torch.Generator().manual_seed(seed)) * 8
    dice = np.random.default_rng(seed)
    masks, samplings = [], []
    for row in range(12):
        is_free = row % 3 == 2
        masks.append(np.zeros(0, np.bool_) if is_free else dice.random(240) < 0.1)
        base = SAMPLINGS[row % len(SAMPLINGS)]
        samplings.append(base if is_free else Sampling(*(*list_of(base)[:-1], DIGITS)))
    texts = tuple([dice.integers(0, 200, 9) for _ in range(12)])
    draw = SamplingInputs(tuple(samplings), np.arange(12), texts, is_guess, texts, tuple(masks))
    found = top_tokens(logits, 3, draw)
    for row, (choices, mask) in enumerate(zip(found, masks, strict=True)):
        assert choices, f"seed {seed}"
        assert not len(mask) or all(mask[token] for token, _ in choices), f"seed {seed}: row {row}"
        assert found[row] == top_tokens(logits[row : row + 1], 3, draw.of([row]))[0], f"seed {seed}: row {row}"


def list_of(sampling: Sampling) -> list[object]:
    return [getattr(sampling, name) for name in Sampling.__slots__]


def test_a_draft_without_any_of_the_tokens_guesses_freely() -> None:
    logits, mask = torch.arange(6.0)[None], np.array([False] * 6 + [True])
    draw = SamplingInputs((Sampling(grammar=DIGITS),), np.arange(1), (), True, (), (mask,))
    assert drawing_scores(logits, draw).tolist() == logits.tolist()
    mask[2] = True
    assert int(drawing_scores(logits, draw).argmax()) == 2
    shorter = SamplingInputs((Sampling(grammar=DIGITS),), np.arange(1), (), True, (), (mask[:4],))
    assert int(drawing_scores(logits, shorter).argmax()) == 2


class Noting:
    """A shard that notes what it is asked."""

    faults: dict[int, int] = {}  # noqa: RUF012
    weight_nbytes = 7

    def sample(self, hidden: object, rows: object, count: int, draw: SamplingInputs | None = None) -> list[object]:
        self.draw = draw
        return []


def test_a_shard_is_told_the_masks_of_the_rows_that_have_a_grammar() -> None:
    inner = Noting()
    shard = GuidedShard(inner, grammars())  # type: ignore[arg-type]
    plain = SamplingInputs((GREEDY,), np.arange(1))
    for draw in (None, plain):
        shard.sample(None, [0], 1, draw)
        assert inner.draw is draw
    texts = (tokens_of("1"), tokens_of("")[:0], tokens_of("123"))
    samplings = (Sampling(grammar=DIGITS), GREEDY, Sampling(grammar=DIGITS))
    shard.sample(None, [0, 1, 2], 1, SamplingInputs(samplings, np.arange(3), generated=texts))
    assert inner.draw is not None
    first, second, third = inner.draw.masks
    assert first[END] and first.sum() > 9 and not len(second) and third.sum() == 1
    assert shard.weight_nbytes == 7 and not shard.faults
