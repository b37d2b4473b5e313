"""Answers that follow a grammar: they do, and they are the same whatever the ranks, the policy and the company."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

from pipeinfer import Engine, Sampling, UserError
from pipeinfer.core.grammar import regex_grammar, schema_grammar
from pipeinfer.core.ports import Command
from pipeinfer.engine.answer import Completion
from pipeinfer.orchestrator.machine import Orchestrator
from pipeinfer.orchestrator.session import Session

pytest.importorskip("llguidance", reason="the package llguidance is not installed")
pytestmark = pytest.mark.slow
TAGS = ["a", "b", "long one"]
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": TAGS}, "maxItems": 3},
    },
    "required": ["name", "n", "tags"],
    "additionalProperties": False,
}
DATE = regex_grammar(r"20[0-9]{2}-(0[1-9]|1[0-2])\/[a-z]{3,8}")
PROMPTS = ("import json\n\nDATA = ", "class Node:\n")
DRAWN = {"temperature": 0.9, "seed": 7}
MORE = {"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.5, "seed": 2**63}
COUNT = 160


def answers(**more: Any) -> list[Completion]:
    """Of several requests at once, with a grammar and without."""
    with Engine(context=256, **{"max_num_seqs": 4, **more}) as engine:
        assert engine is not None
        handles = []
        for prompt in PROMPTS:
            for given in ({}, DRAWN, MORE):
                sampling = Sampling(**given)  # type: ignore[arg-type]
                handles.append(engine.submit(prompt, COUNT, sampling=sampling, grammar=SCHEMA))
                handles.append(engine.submit(prompt, 24, sampling=sampling))
            handles.append(engine.submit(prompt, COUNT, sampling=Sampling(**DRAWN), grammar=DATE))  # type: ignore[arg-type]
        return [handle.result() for handle in handles]


@cache
def reference() -> list[Completion]:
    return answers(policy="plain")


def follows(text: str) -> bool:
    """Whether ``text`` is a JSON text under SCHEMA."""
    found = json.loads(text)
    assert isinstance(found, dict)
    name, n, tags = (found[key] for key in ("name", "n", "tags"))
    assert len(found) == 3 and isinstance(name, str) and len(name) <= 12
    assert type(n) is int and 0 <= n <= 99
    return isinstance(tags, list) and len(tags) <= 3 and all(tag in TAGS for tag in tags)


def test_answers_follow_their_grammars() -> None:
    found = reference()
    for index, one in enumerate(found):
        kind = index % 7
        if kind == 6:
            assert one.finish_reason == "stop"
            year, rest = one.text.split("-")
            assert year.isdigit() and rest[2] == "/" and rest[3:].isalpha()
        elif kind % 2 == 0:
            assert one.finish_reason == "stop" and follows(one.text)
            assert "\n" not in one.text
            assert len(one.logprobs) == len(one.tokens)


@pytest.mark.parametrize(
    "more",
    [
        {"ranks": 1, "policy": "continuous"},
        {"ranks": 2, "policy": "continuous"},
        {"ranks": 2, "policy": "continuous", "tp": 2},
        {"ranks": 1, "policy": "continuous", "draft": "none"},  # guesses from the text may contradict the grammar
    ],
    ids=["alone", "two", "group", "lookup"],
)
def test_tokens_are_those_of_plain_decoding(more: dict[str, Any]) -> None:
    for one, wanted in zip(answers(**more), reference(), strict=True):
        assert (one.tokens, one.finish_reason, one.text) == (wanted.tokens, wanted.finish_reason, wanted.text)


def test_a_request_that_begins_again_goes_on_in_its_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    begin_again, count = Orchestrator._preempt, 0

    def counted(self: Orchestrator, session: Session) -> list[Command]:
        nonlocal count
        count += 1
        return begin_again(self, session)

    monkeypatch.setattr(Orchestrator, "_preempt", counted)
    found = answers(policy="plain", max_num_seqs=16, kv_memory="1100K", dtype="bf16")
    assert [one.tokens for one in found] == [one.tokens for one in answers(policy="plain", dtype="bf16")]
    assert count, "there was room for all"


def test_the_grammar_may_be_part_of_the_sampling() -> None:
    with Engine(policy="plain", context=256) as engine:
        assert engine is not None
        found = engine.submit(PROMPTS[0], COUNT, sampling=Sampling(**DRAWN), grammar=SCHEMA).result()  # type: ignore[arg-type]
        sampling = Sampling(**found.config["sampling"])
        assert sampling.grammar == schema_grammar(SCHEMA)
        assert engine.decode_alone(PROMPTS[0], COUNT, sampling=sampling) == found.tokens


def test_what_cannot_be_served_is_refused_before_anything_is_submitted() -> None:
    with Engine() as engine:
        assert engine is not None
        for grammar, more, said in (
            ({"type": "nonsense"}, {}, "llguidance refuses the grammar"),
            ("start: x", {}, "a grammar that is not JSON"),
            (SCHEMA, {"ignore_eos": True}, "a grammar with ignore_eos"),
        ):
            with pytest.raises(UserError, match=said):
                engine.submit("x", 4, grammar=grammar, **more)  # type: ignore[arg-type]
    with Engine(forced_acceptance=0.5, policy="continuous", draft="builtin") as engine:
        assert engine is not None
        with pytest.raises(UserError, match="tokens that mean nothing"):
            engine.submit("x", 4, grammar=SCHEMA)
