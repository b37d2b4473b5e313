"""Grammars as text: what is made of schemas and patterns, what requests may say, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeinfer.core.errors import UserError
from pipeinfer.core.grammar import FORM, OBJECT, exact_grammar, regex_grammar, schema_grammar
from pipeinfer.core.messages import MAX_GRAMMAR, Message
from pipeinfer.core.ports import GREEDY, Sampling, SamplingInputs
from pipeinfer.core.sampling import exact
from pipeinfer.core.wire import decode, encode
from pipeinfer.serve.errors import ApiError
from pipeinfer.serve.fields import ApiRequest, parse

SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"const": "\u00e9"}}, "required": ["z", "a"]}


def read(is_chat: bool = False, **fields: Any) -> ApiRequest:
    own = {"messages": [{"role": "user", "content": "hello"}]} if is_chat else {"prompt": "x"}
    return parse(json.dumps(own | fields).encode(), is_chat, ("default",))


def test_a_grammar_keeps_the_order_of_properties_and_travels_unchanged() -> None:
    text = schema_grammar(SCHEMA)
    (found,) = json.loads(text)["grammars"]
    assert list(found["json_schema"]["properties"]) == ["z", "a"]
    assert {key: found["json_schema"][key] for key in SCHEMA} == SCHEMA
    sampling = exact(Sampling(0.5, grammar=text))
    assert sampling.grammar == text and text.isascii()
    message = Message(0, 1, sampling.settings(7, 3))
    assert Sampling.of(decode(encode(message)).body) == replace(sampling, prompt_length=3)  # type: ignore[arg-type]
    assert exact_grammar(json.dumps(json.loads(text), indent=3)) == text
    assert exact(GREEDY).grammar == ""


def test_a_json_text_is_one_line_unless_the_schema_says_otherwise() -> None:
    assert json.loads(schema_grammar(OBJECT))["grammars"][0]["json_schema"] == {**OBJECT, "x-guidance": FORM}
    own = {"whitespace_flexible": True}
    found = json.loads(schema_grammar({**OBJECT, "x-guidance": own}))["grammars"][0]["json_schema"]
    assert found == {**OBJECT, "x-guidance": own}


@pytest.mark.parametrize(
    ("pattern", "written"),
    [("[0-9]+", "[0-9]+"), ("a/b", r"a\/b"), (r"a\/b", r"a\/b"), ("a\nb", r"a\nb"), (r"\\/", r"\\\/")],
)
def test_a_pattern_is_one_expression_of_one_line(pattern: str, written: str) -> None:
    assert json.loads(regex_grammar(pattern)) == {"grammars": [{"lark_grammar": f"start: /{written}/"}]}


@pytest.mark.parametrize("grammar", ["{", "[]", "start: 'a'", "5", "[" * 100_000, '{"a":"' + "x" * MAX_GRAMMAR + '"}'])
def test_what_is_no_grammar_is_refused(grammar: str) -> None:
    with pytest.raises(UserError, match="grammar"):
        exact(Sampling(grammar=grammar))


def test_a_grammar_needs_the_generated_tokens_and_no_two_are_alike() -> None:
    one, other = (exact(Sampling(grammar=schema_grammar(schema))) for schema in (SCHEMA, OBJECT))
    assert one.needs_generated and not GREEDY.needs_generated and not one.penalises_generated
    masks = np.array([True]), np.array([False]), np.array([True, True])
    draw = SamplingInputs((one, GREEDY, other), np.arange(3), masks=masks)
    assert [mask.tolist() for mask in draw.of([2, 0]).masks] == [[True, True], [True]]


@pytest.mark.parametrize("is_chat", [False, True])
def test_what_requests_may_say(is_chat: bool) -> None:
    wanted = {"name": "it", "schema": SCHEMA, "strict": True, "description": "of no use"}
    by_schema = {"type": "json_schema", "json_schema": wanted}
    assert read(is_chat, response_format=by_schema).grammar == (schema_grammar(SCHEMA), "response_format")
    assert read(is_chat, response_format={"type": "json_object"}).grammar == (schema_grammar(OBJECT), "response_format")
    assert read(is_chat, response_format={"type": "text"}, guided_json=None).grammar == ("", "")
    for schema in (SCHEMA, json.dumps(SCHEMA)):
        assert read(is_chat, guided_json=schema).grammar == (schema_grammar(SCHEMA), "guided_json")
    assert read(is_chat, guided_regex="a|b").grammar == (regex_grammar("a|b"), "guided_regex")


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("response_format", {"response_format": "json_object"}),
        ("response_format", {"response_format": {}}),
        ("response_format", {"response_format": {"type": "xml"}}),
        ("response_format", {"response_format": {"type": "json_object", "json_schema": {}}}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"schema": True}}}),
        ("other", {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "other": 1}}}),
        ("strict", {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}}),
        ("guided_json", {"guided_json": "[]"}),
        ("guided_json", {"guided_json": "{"}),
        ("guided_json", {"guided_json": 5}),
        ("guided_json", {"guided_json": {"const": "x" * MAX_GRAMMAR}}),
        ("guided_regex", {"guided_regex": ["a"]}),
        ("guided_regex", {"guided_regex": "x" * MAX_GRAMMAR}),
        ("guided_regex", {"guided_regex": "x", "guided_json": {}}),
        ("ignore_eos", {"guided_regex": "x", "ignore_eos": True}),
        ("guided_grammar", {"guided_grammar": "start: x"}),
    ],
)
def test_what_requests_may_not_say(param: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as refused:
        read(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)
