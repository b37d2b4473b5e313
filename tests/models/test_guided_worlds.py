"""Real models under grammars, in the simulator's time: the tokens are those of plain decoding, and drafts guess within
the grammar."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.core.grammar import regex_grammar, schema_grammar
from pipeinfer.core.ports import GREEDY, Request, Sampling, ShardModel
from pipeinfer.sim.world import Answer
from pipeinfer.text import Text
from stages.models.grammar import Grammars, Mask
from stages.models.guided import GuidedShard
from stages.models.pair import CheckpointPair
from tests.models.in_process import POLICIES, decode, pair_of

pytest.importorskip("llguidance", reason="the package llguidance is not installed")
pytestmark = pytest.mark.slow
TARGET, DRAFT = (model_directory(BUILTIN, name) for name in ("target", "draft"))
VOCABULARY, END, COUNT = 2048, 0, 80
SCHEMA = schema_grammar(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "tags": {"items": {"enum": ["a", "long one"]}}},
        "required": ["name", "tags"],
    }
)
WORDS = regex_grammar("([a-z]{2,6} ){4}end")
SAMPLINGS = (
    Sampling(grammar=SCHEMA),
    GREEDY,
    Sampling(0.9, seed=7, grammar=WORDS),
    Sampling(0.8, 40, 0.95, 0.02, 1.1, 3, 0.5, 0.25, grammar=SCHEMA),
)


class Anything:
    """Grammars that allow every token."""

    def mask(self, grammar: str, generated: object) -> Mask:
        return np.ones(VOCABULARY, np.bool_)


class FreeDraft:
    """``pair``, whose draft does not know the grammar."""

    def __init__(self, pair: CheckpointPair) -> None:
        self._pair = pair

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pair, name)

    def draft(self, index: int, capacity: int) -> ShardModel:
        shard = self._pair.draft(index, capacity)
        assert isinstance(shard, GuidedShard)
        return GuidedShard(shard.shard, Anything())  # type: ignore[arg-type]


def answers(policy: str, is_free: bool = False) -> list[Answer]:
    pair: Any = pair_of(TARGET, DRAFT, grammars=Grammars(TARGET, VOCABULARY, lambda: [END]))
    prompt = tuple(Text(TARGET).encode("import json\n\nDATA = "))
    return decode(
        FreeDraft(pair) if is_free else pair,
        POLICIES[policy],
        [Request(prompt, COUNT, frozenset([END]), one) for one in SAMPLINGS],
    )


@cache
def plain() -> list[list[int]]:
    return [answer.tokens for answer in answers("plain")]


@pytest.mark.parametrize("policy", ["continuous", "rounds", "pipeinfer"])
def test_tokens_are_those_of_plain_decoding(policy: str) -> None:
    assert [answer.tokens for answer in answers(policy)] == plain()


def test_a_draft_that_knows_the_grammar_is_accepted_more_often() -> None:
    knowing, free = answers("rounds"), answers("rounds", is_free=True)
    assert [answer.tokens for answer in free] == plain()
    corrections = [[each.stats.corrections for each in found if each.stats] for found in (knowing, free)]
    for sampling, with_grammar, without in zip(SAMPLINGS, *corrections, strict=True):
        assert not sampling.grammar or with_grammar < without
