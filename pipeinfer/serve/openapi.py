"""The description of the endpoints in OpenAPI's form (version 3.1), for tools that make clients or requests from it."""

from __future__ import annotations

import itertools
from typing import Any

from pipeinfer.core.sampling import LEAST, MOST, MOST_STOPS
from pipeinfer.core.version import __version__
from pipeinfer.serve.fields import LIMITS, MOST_CHOICES, MOST_PRIORITY
from pipeinfer.serve.prompts import ROLES
from pipeinfer.serve.sampling_fields import MOST_BIAS, MOST_BIASES, MOST_PENALTY, MOST_TOP

Schema = dict[str, Any]
BOOLEAN: Schema = {"type": ["boolean", "null"]}
NULL: Schema = {"type": "null"}
TEXT: Schema = {"type": "string"}
TOKEN_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
LEAST_TOP_P = 2.0**-150  # in 32 bits this and less is 0
ERRORS = {
    400: "a field is wrong, or not supported; `param` names it",
    401: "the API key is missing or wrong",
    404: "there is no such model",
    408: "the body has not come in time",
    413: "the body is too long",
    422: "the chat template does not take the conversation",
    429: "too many requests wait",
    503: "the model is being loaded, or the server ends or has too many connections",
}


def _number(least: float, most: float) -> Schema:
    return {"type": ["number", "null"], "minimum": least, "maximum": most}


def _whole(least: int, most: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": least, "maximum": most}


def _object(required: list[str], properties: dict[str, Schema], is_open: bool = False) -> Schema:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": is_open}


def _only_with(name: str, neutral: list[Any], other: str, value: Any, is_needed: bool) -> Schema:
    """Field ``name`` may be other than ``neutral`` only where field ``other`` is ``value``; absent: ``is_needed``."""
    bound: Schema = {"properties": {other: {"const": value}}} | ({"required": [other]} if is_needed else {})
    return {"anyOf": [{"properties": {name: {"enum": neutral}}}, bound]}


def document(model: str) -> dict[str, Any]:
    """The description of a server of ``model``."""
    names = [model, "default"]
    posts = {
        "/v1/completions": ("Complete a text.", _completion(names)),
        "/v1/chat/completions": ("Answer in a conversation.", _chat(names)),
        "/tokenize": ("The tokens of a text or a conversation.", _tokenize(names)),
        "/detokenize": ("The text of tokens.", _detokenize(names)),
    }
    gets = {"/v1/models": "The model.", "/status": "What the server does."}
    paths: dict[str, Any] = {path: {"post": _post(what, body)} for path, (what, body) in posts.items()}
    paths |= {path: {"get": _get(what, (401,))} for path, what in gets.items()}
    paths["/health"] = {"get": _get("Whether the server can serve.", (503,)) | {"security": []}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "pipeinfer", "version": __version__, "description": "OpenAI's interface, with additions."},
        "paths": paths,
        "security": [{}, {"key": []}],
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _error()},
        },
    }


def _post(what: str, body: Schema) -> Schema:
    content = {"application/json": {"schema": body}}
    streams: Schema = {"text/event-stream": {"schema": {}}} if "stream" in str(body) else {}
    answers = {"200": {"description": what, "content": {"application/json": {"schema": {"type": "object"}}} | streams}}
    return {
        "summary": what,
        "requestBody": {"required": True, "content": content},
        "responses": answers | {str(status): _refusal(status) for status in ERRORS},
    }


def _get(what: str, errors: tuple[int, ...]) -> Schema:
    answers = {"200": {"description": what, "content": {"application/json": {"schema": {"type": "object"}}}}}
    return {"summary": what, "responses": answers | {str(status): _refusal(status) for status in errors}}


def _refusal(status: int) -> Schema:
    schema = {"$ref": "#/components/schemas/Error"}
    return {"description": ERRORS[status], "content": {"application/json": {"schema": schema}}}


def _error() -> Schema:
    optional = {"type": ["string", "null"]}
    inner = _object(
        ["message", "type", "param", "code"], {"message": TEXT, "type": TEXT, "param": optional, "code": optional}
    )
    return _object(["error"], {"error": inner})


def _model(names: list[str]) -> Schema:
    return {"type": ["string", "null"], "enum": [*names, None]}


def _shared(names: list[str], least: int) -> dict[str, Schema]:
    """The fields of both endpoints that decode. ``least``: new tokens."""
    usage = _object([], {"include_usage": BOOLEAN, "continuous_usage_stats": BOOLEAN})
    stop: Schema = {"type": "string", "minLength": 1}
    bias = {"type": ["object", "null"], "maxProperties": MOST_BIASES, "propertyNames": {"pattern": "^[0-9]{1,9}$"}}
    return {
        "presence_penalty": _number(-MOST_PENALTY, MOST_PENALTY),
        "frequency_penalty": _number(-MOST_PENALTY, MOST_PENALTY),
        "logit_bias": bias | {"additionalProperties": {"type": "number", "minimum": -MOST_BIAS, "maximum": MOST_BIAS}},
        "model": _model(names),
        "n": _whole(1, MOST_CHOICES),
        **{name: {"type": ["integer", "null"], "minimum": least} for name in LIMITS},
        "temperature": {"anyOf": [{"const": 0}, _number(LEAST, MOST)]},
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": LEAST_TOP_P, "maximum": 1},
        "top_k": _whole(-1, 2**31 - 1),
        "min_p": _number(0, 1),
        "repetition_penalty": _number(LEAST, MOST),
        "seed": _whole(-(2**63), 2**64 - 1),
        "stop": {"anyOf": [stop, NULL, {"type": "array", "items": stop, "maxItems": MOST_STOPS}]},
        "ignore_eos": BOOLEAN,
        "response_format": _response_format(),
        "guided_json": {"type": ["object", "null"]},
        "guided_regex": {"type": ["string", "null"]},
        "priority": _whole(-MOST_PRIORITY, MOST_PRIORITY),
        "stream": BOOLEAN,
        "stream_options": usage | {"type": ["object", "null"]},
        "user": {"description": "ignored"},
    }


def _response_format() -> Schema:
    text: Schema = {"type": ["string", "null"]}
    named = {"name": text, "description": text, "schema": {"type": "object"}, "strict": BOOLEAN}
    by_schema = {"type": {"const": "json_schema"}, "json_schema": _object(["schema"], named)}
    plain = _object(["type"], {"type": {"enum": ["text", "json_object"]}})
    return {"anyOf": [plain, _object(["type", "json_schema"], by_schema), NULL]}


def _one_of(neutral: dict[str, list[Any]]) -> list[Schema]:
    """At most one of the fields may be other than ``neutral``."""
    absent = [{"properties": {name: {"enum": values}}} for name, values in neutral.items()]
    return [{"anyOf": list(pair)} for pair in itertools.combinations(absent, 2)]


STREAM_OPTIONS = _only_with("stream_options", [None], "stream", True, is_needed=True)
GRAMMAR: dict[str, list[Any]] = {
    "response_format": [None, {"type": "text"}],
    "guided_json": [None],
    "guided_regex": [None, ""],
}
TOGETHER = [STREAM_OPTIONS, *_one_of(GRAMMAR | {"ignore_eos": [None, False]})]


def _completion(names: list[str]) -> Schema:
    text: Schema = {"type": "string", "minLength": 1}
    several = [{"type": "array", "items": one, "minItems": 1, "maxItems": MOST_CHOICES} for one in (text, TOKEN_IDS)]
    own = {"prompt": {"anyOf": [text, TOKEN_IDS, *several]}, "echo": BOOLEAN, "logprobs": _whole(0, MOST_TOP)}
    scores = {"echo": {"const": True}, "logprobs": {"type": "integer"}}
    some_new = {"properties": {name: {"minimum": 1} for name in LIMITS}}
    some_told = {"anyOf": [some_new, {"properties": scores, "required": [*scores]}]}
    return _object(["prompt"], own | _shared(names, 0)) | {"allOf": [*TOGETHER, some_told]}


def _messages() -> Schema:
    part = _object(["type", "text"], {"type": {"const": "text"}, "text": TEXT}, is_open=True)
    content = {"anyOf": [TEXT, {"type": "array", "items": part, "minItems": 1}]}
    message = _object(["role", "content"], {"role": {"enum": list(ROLES)}, "content": content})
    return {"type": "array", "items": message, "minItems": 1}


def _chat(names: list[str]) -> Schema:
    own = {"messages": _messages(), "logprobs": BOOLEAN, "top_logprobs": _whole(0, MOST_TOP)}
    tops = _only_with("top_logprobs", [None, 0], "logprobs", True, is_needed=True)
    return _object(["messages"], own | _shared(names, 1)) | {"allOf": [*TOGETHER, tops]}


def _tokenize(names: list[str]) -> Schema:
    shared = {"model": _model(names), "return_token_strs": BOOLEAN}
    return {
        "anyOf": [
            _object(["prompt"], shared | {"prompt": TEXT}),
            _object(["messages"], shared | {"messages": _messages()}),
        ]
    }


def _detokenize(names: list[str]) -> Schema:
    return _object(["tokens"], {"model": _model(names), "tokens": TOKEN_IDS | {"minItems": 0}})
