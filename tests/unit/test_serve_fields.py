"""The fields of a request to the server: what is read, and what is refused with the field's name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeinfer.serve.errors import ApiError
from pipeinfer.serve.fields import ApiRequest, parse

HELLO = [{"role": "user", "content": "hello"}]


def read(is_chat: bool = False, **fields: Any) -> ApiRequest:
    default: dict[str, Any] = {"messages": HELLO} if is_chat else {"prompt": "x"}
    return parse(json.dumps(default | fields).encode(), is_chat, ("mine", "default"))


def error(is_chat: bool = False, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as found:
        read(is_chat, **fields)
    return found.value


def test_everything_at_once() -> None:
    sampling = {"temperature": 1, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.5, "top_k": 4, "seed": -1}
    options = {"include_usage": True, "continuous_usage_stats": True}
    more = {"stop": ["a", "b"], "max_tokens": 7, "stream": True, "stream_options": options, "n": 3, "priority": -2}
    asked = read(**sampling, **more, logprobs=0, ignore_eos=True, model="default")
    wanted = sampling | {"temperature": 1.0, "seed": 2**64 - 1}
    assert asked == ApiRequest(["x"], None, 3, wanted, 7, ("a", "b"), True, True, True, True, logprobs=0, priority=-2)
    assert read(max_tokens=7, max_completion_tokens=8).max_new_tokens == 8
    assert read(top_k=-1).sampling == {"top_k": 0}
    assert read(echo=True).echo
    assert read() == ApiRequest(["x"])


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("text", ["text"]),
        (["text"], ["text"]),
        (["a", "b"], ["a", "b"]),
        ([5, 7], [[5, 7]]),
        ([[5, 7]], [[5, 7]]),
        ([[5], [7, 8]], [[5], [7, 8]]),
        ([5.0, 7], [[5, 7]]),
    ],
)
def test_prompts(prompt: Any, wanted: Any) -> None:
    assert read(prompt=prompt).prompts == wanted


def test_whole_numbers_may_be_written_with_a_fraction_of_zero() -> None:
    asked = read(max_tokens=7.0, n=3.0, seed=1.0, top_k=4.0, logprobs=2.0, priority=-2.0)
    assert asked == read(max_tokens=7, n=3, seed=1, top_k=4, logprobs=2, priority=-2)
    assert type(asked.max_new_tokens) is type(asked.sampling["seed"]) is int


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("presence_penalty", 1, 1.0),
        ("frequency_penalty", -0.5, -0.5),
        ("logit_bias", {"7": -100, "5": 1.5}, ((5, 1.5), (7, -100.0))),
    ],
)
def test_penalties_and_biases(field: str, value: Any, wanted: Any) -> None:
    assert read(**{field: value}).sampling == {field: wanted}


def test_log_probabilities() -> None:
    assert read(True, logprobs=True).logprobs == 0
    assert read(True, logprobs=False).logprobs is None
    for is_chat, fields in ((False, {"logprobs": 3}), (True, {"logprobs": True, "top_logprobs": 3})):
        assert read(is_chat, **fields).logprobs == 3


def test_a_prompt_is_scored_where_it_is_echoed_with_log_probabilities() -> None:
    assert read(echo=True, logprobs=0).scores_prompt
    assert not any(read(**fields).scores_prompt for fields in ({"echo": True}, {"logprobs": 3}, {}))
    assert not read(True, logprobs=True).scores_prompt
    for name in ("max_tokens", "max_completion_tokens"):
        assert read(echo=True, logprobs=1, **{name: 0}).max_new_tokens == 0
        for fields in ({"echo": True}, {"logprobs": 1}, {"echo": True, "logprobs": 1, name: -1}):
            found = error(**{name: 0} | fields)
            assert (found.status, found.param) == (400, name)


def test_the_old_name_is_checked_beside_the_new_one() -> None:
    found = error(max_completion_tokens=8, max_tokens=0)
    assert (found.status, found.param) == (400, "max_tokens")


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    given = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": None}]
    asked = read(True, messages=given, logprobs=True)
    assert asked.messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a\nb"}]
    assert asked.logprobs == 0


@pytest.mark.parametrize("is_chat", [False, True])
def test_values_that_change_nothing_are_taken(is_chat: bool) -> None:
    read(is_chat, n=1, logit_bias={}, presence_penalty=0, frequency_penalty=0.0, user="me", metadata={"a": "b"})
    read(is_chat, n=None, temperature=None, stop=None, stream=None, max_tokens=None, model=None)
    read(True, tools=[], tool_choice="none", response_format={"type": "text"}, top_logprobs=0, modalities=["text"])
    read(echo=False, best_of=1, suffix="", min_tokens=0, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("is_chat", "field", "value"),
    [
        (False, "n", 0),
        (False, "n", 129),
        (False, "n", True),
        (False, "echo", 1),
        (False, "best_of", 3),
        (True, "echo", True),
        (False, "priority", 1.5),
        (False, "priority", 2**31),
        (False, "suffix", "end"),
        (False, "logit_bias", {"-5": 1}),
        (False, "logit_bias", {"5": 101}),
        (False, "logit_bias", {"5": "1"}),
        (False, "logit_bias", {str(token): 1 for token in range(301)}),
        (False, "logit_bias", [5]),
        (False, "presence_penalty", 2.5),
        (False, "frequency_penalty", -3),
        (False, "guided_choice", ["a"]),
        (False, "min_tokens", 4),
        (False, "tools", []),
        (False, "logprobs", 21),
        (False, "logprobs", True),
        (False, "prompt", None),
        (False, "prompt", 5),
        (False, "prompt", ["a", 5]),
        (False, "prompt", [[1], ["a"]]),
        (False, "prompt", ["a"] * 129),
        (False, "prompt", [1, "a"]),
        (False, "prompt", [1, True]),
        (False, "prompt", [1, 2.5]),
        (False, "messages", HELLO),
        (False, "unheard_of", 1),
        (False, "unheard_of", None),
        (False, "temperature", "warm"),
        (False, "temperature", True),
        (False, "temperature", -1),
        (False, "temperature", 10**400),
        (False, "top_p", 0),
        (False, "top_k", 1.5),
        (False, "min_p", 2),
        (False, "min_p", 1.0000000000000002),
        (False, "min_p", -1e-60),
        (False, "top_p", 1.0000000000000002),
        (False, "temperature", 100000.00000000001),
        (False, "temperature", 1e-60),
        (False, "repetition_penalty", 100000.00000000001),
        (False, "repetition_penalty", 0),
        (False, "seed", 2**64),
        (False, "seed", 1.5),
        (False, "max_tokens", 0),
        (False, "max_tokens", 1.5),
        (False, "max_completion_tokens", -1),
        (False, "stop", 5),
        (False, "stop", ["a", 5]),
        (False, "stop", [""]),
        (False, "stop", ["a"] * 17),
        (False, "stream", "yes"),
        (False, "stream_options", {"include_usage": True}),
        (False, "model", 5),
        (True, "messages", None),
        (True, "messages", []),
        (True, "messages", "hello"),
        (True, "tools", [{"type": "function"}]),
        (True, "tool_choice", "required"),
        (True, "response_format", {"type": "xml"}),
        (True, "modalities", ["audio"]),
        (True, "logprobs", 1),
        (True, "response_format", {"type": "json_schema", "json_schema": {}}),
        (True, "top_logprobs", 3),
        (True, "prompt", "x"),
    ],
)
def test_refusals_name_the_field(is_chat: bool, field: str, value: Any) -> None:
    found = error(is_chat, **{field: value})
    assert (found.status, found.param) == (400, field)
    assert field in str(found) or field in ("stop", "prompt")
    assert set(found.body()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hello", "messages[0]"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls"),
    ],
)
def test_messages_that_are_refused(message: Any, param: str) -> None:
    found = error(True, messages=[message])
    assert (found.status, found.param) == (400, param)


def test_a_value_too_deep_to_be_shown() -> None:
    for depth in (900, 960, 980):
        with pytest.raises(ApiError) as found:
            parse(b'{"prompt": "x", "suffix": ' + b"[" * depth + b"]" * depth + b"}", False, ("mine", "default"))
        assert found.value.status == 400


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b"\xff", b'{"prompt": NaN}', b"[" * 100_000, b'{"seed": ' + b"1" * 5000 + b"}"]
)
def test_what_is_no_json_object(data: bytes) -> None:
    with pytest.raises(ApiError, match="the body is not") as found:
        parse(data, False, ("mine", "default"))
    assert found.value.status == 400


def test_another_model_is_not_found() -> None:
    found = error(model="gpt-\ud800")
    assert (found.status, found.param, found.code) == (404, "model", "model_not_found")
    json.dumps(found.body()).encode()
