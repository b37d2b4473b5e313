"""/openapi.json names the fields that are taken, and no others."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from pipeinfer.serve import fields
from pipeinfer.serve.errors import ApiError
from tests.unit.scripted_engine import Scripted, asked, served, told


@pytest.fixture(scope="module")
def document() -> Any:
    with served(Scripted()) as server:
        status, found = told(asked(server, "/openapi.json"))
    assert status == 200
    return found


@pytest.mark.parametrize(
    ("path", "own"),
    [("/v1/completions", {"prompt", "echo"}), ("/v1/chat/completions", {"messages", "top_logprobs"})],
)
def test_fields(document: Any, path: str, own: set[str]) -> None:
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == fields._SUPPORTED | own | {"user"}
    assert schema["properties"]["model"]["enum"] == ["mine", "default", None]


def test_every_path_is_served(document: Any) -> None:
    with served(Scripted()) as server:
        for path, methods in document["paths"].items():
            response = asked(server, path, {} if "post" in methods else None)
            assert response.status not in (404, 405, 500), path
            response.close()


ABSENT = object()
KINDS: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "null": (type(None),),
    "integer": (int,), "number": (int, float),
}  # fmt: skip


def fits(schema: Any, value: Any) -> bool:
    """Whether ``value`` is valid under ``schema``, by those words of JSON Schema that bind fields together."""
    kinds = schema.get("type", [])
    checks = [
        not kinds
        or type(value) in [kind for name in ([kinds] if isinstance(kinds, str) else kinds) for kind in KINDS[name]],
        "const" not in schema or value == schema["const"],
        "enum" not in schema or value in schema["enum"],
        "minimum" not in schema or not isinstance(value, int) or value >= schema["minimum"],
        all(fits(one, value) for one in schema.get("allOf", [])),
        "anyOf" not in schema or any(fits(one, value) for one in schema["anyOf"]),
    ]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        checks += [name in value for name in schema.get("required", [])]
        checks += [fits(known[name], one) for name, one in value.items() if name in known]
        checks += [name in known for name in value if schema.get("additionalProperties") is False]
    return all(checks)


TOGETHER: list[dict[str, list[Any]]] = [
    {"stream": [None, False, True], "stream_options": [None, {}, {"include_usage": True}]},
    {"echo": [None, False, True], "logprobs": [None, 0, 3]},
    {"logprobs": [None, False, True], "top_logprobs": [None, 0, 3]},
    {"ignore_eos": [None, False, True], "guided_json": [None, {}]},
    {"echo": [None, False, True], "max_tokens": [None, 0, 1], "logprobs": [None, 0]},
    {"echo": [None, True], "max_completion_tokens": [0, 2], "max_tokens": [0, 2], "logprobs": [None, 0]},
    {"max_tokens": [None, 0, 1], "max_completion_tokens": [None, 0, 1]},
    {"guided_regex": [None, "", "a"], "response_format": [None, {"type": "text"}, {"type": "json_object"}, {}]},
]


@pytest.mark.parametrize(
    ("is_chat", "together"),
    [
        (False, TOGETHER[0]),
        (True, TOGETHER[0]),
        (False, TOGETHER[1]),
        (True, TOGETHER[2]),
        (False, TOGETHER[3]),
        (False, TOGETHER[4]),
        (False, TOGETHER[5]),
        (True, TOGETHER[6]),
        (True, TOGETHER[7]),
    ],
)
def test_what_fits_the_schema_is_taken_and_nothing_else(
    document: Any, is_chat: bool, together: dict[str, list[Any]]
) -> None:
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    own = {"messages": [{"role": "user", "content": "x"}]} if is_chat else {"prompt": "x"}
    for values in itertools.product(*([ABSENT, *some] for some in together.values())):
        body = own | {name: value for name, value in zip(together, values, strict=True) if value is not ABSENT}
        try:
            fields.parse(json.dumps(body).encode(), is_chat, ("mine", "default"))
        except ApiError:
            assert not fits(schema, body), body
        else:
            assert fits(schema, body), body
