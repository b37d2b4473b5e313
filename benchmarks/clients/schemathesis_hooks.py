"""What the OpenAPI document cannot say, for schemathesis (SCHEMATHESIS_HOOKS).

The model's context and vocabulary bound a request. Requests are cut to that. Grammars become simple ones. What violates
the document stays."""

from __future__ import annotations

from typing import Any

import schemathesis

MOST_NEW, VOCABULARY, MOST_LETTERS = 32, 256, 8


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Change the body that is about to be sent."""
    if isinstance(case.body, dict):
        for name, value in case.body.items():
            case.body[name] = bounded(name, value)
        if isinstance(case.body.get("prompt"), list) and is_number(case.body.get("n"), least=1):
            case.body["n"] = 1  # all choices of all prompts are bounded


def bounded(name: str, value: Any) -> Any:
    """``value`` of the field ``name`` within what the model can do."""
    if name in ("max_tokens", "max_completion_tokens") and is_number(value, least=1):
        return min(value, MOST_NEW)
    if name in ("prompt", "tokens") and isinstance(value, list):
        return [bounded(name, one) if isinstance(one, list) else in_vocabulary(one) for one in value]
    if name == "messages" and isinstance(value, list):
        return [shortened(message) for message in value]
    if name == "logit_bias" and isinstance(value, dict):
        return {str(int(token) % VOCABULARY) if token.isdecimal() else token: bias for token, bias in value.items()}
    if name == "guided_json" and isinstance(value, dict):
        return {}
    if name == "guided_regex" and isinstance(value, str) and value:
        return "[a-z]*"
    if name == "response_format" and isinstance(value, dict) and isinstance(value.get("json_schema"), dict):
        named = value["json_schema"]
        return value | {"json_schema": named | {"schema": {}}} if isinstance(named.get("schema"), dict) else value
    return value


def shortened(value: Any) -> Any:
    """A message, or a part of one, with short texts."""
    if isinstance(value, dict):
        short = {name: shortened(value[name]) for name in ("content", "text") if name in value}
        return value | short
    if isinstance(value, list):
        return [shortened(one) for one in value]
    return value[:MOST_LETTERS] if isinstance(value, str) else value


def in_vocabulary(token: Any) -> Any:
    """``token``, or another that the model knows."""
    return token % VOCABULARY if is_number(token, least=0) else token


def is_number(value: Any, least: int) -> bool:
    """Whether ``value`` is a number and not below ``least``."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= least
