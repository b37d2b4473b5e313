"""The fields of a request body that say which form the answer must have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeinfer.core.errors import UserError
from pipeinfer.core.grammar import OBJECT, regex_grammar, schema_grammar
from pipeinfer.serve.checks import flag, refuse_others, shown, take
from pipeinfer.serve.errors import invalid

GRAMMARS = ("response_format", "guided_json", "guided_regex")
"""The names of the fields; the last two are vLLM's."""


def grammar(fields: Mapping[str, Any]) -> tuple[str, str]:
    """The grammar that is asked for (see core.grammar) and the name of its field; empty for none. Raises ApiError for
    more than one."""
    found = []
    for name, read in zip(GRAMMARS, (_of_format, _of_schema, _of_pattern), strict=True):
        try:
            if text := read(fields, name):
                found.append((text, name))
        except UserError as error:
            raise invalid(name, f"{name}: {error}") from None
    if len(found) > 1:
        raise invalid(found[1][1], f"{found[1][1]} beside {found[0][1]}: give one of them")
    return found[0] if found else ("", "")


def _of_format(fields: Mapping[str, Any], name: str) -> str:
    asked = take(fields, name, (dict,), "an object")
    if asked is None:
        return ""
    kind = asked.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise invalid(name, f'{name}: type must be "text", "json_object" or "json_schema", not {shown(kind)}')
    others = [key for key in asked if key != "type" and (key, kind) != ("json_schema", "json_schema")]
    if others:
        raise invalid(name, f"{name}: unknown field {shown(others[0])}; leave it out")
    if kind != "json_schema":
        return schema_grammar(OBJECT) if kind == "json_object" else ""
    named = asked.get("json_schema")
    if not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
        raise invalid(name, f"{name}: json_schema must be an object whose schema is an object, not {shown(named)}")
    refuse_others(named, ("name", "description", "schema", "strict"), {})
    flag(named, "strict")  # an answer always follows the schema
    for told in ("name", "description"):
        take(named, told, (str,), "a text")
    return schema_grammar(named["schema"])


def _of_schema(fields: Mapping[str, Any], name: str) -> str:
    asked = take(fields, name, (dict, str), "a JSON schema: an object, or its text")
    if isinstance(asked, str):
        try:
            asked = json.loads(asked)
        except (ValueError, RecursionError):
            asked = None
        if not isinstance(asked, dict):
            raise invalid(name, f"{name} is not the text of a JSON object")
    return "" if asked is None else schema_grammar(asked)


def _of_pattern(fields: Mapping[str, Any], name: str) -> str:
    asked = take(fields, name, (str,), "a regular expression")
    return regex_grammar(asked) if asked else ""
