"""Grammars that an answer must follow, as JSON text in the form that the llguidance library reads.

    {"grammars": [{"json_schema": {...}}]}   or   {"grammars": [{"lark_grammar": "start: ..."}]}

A grammar travels with a sequence's settings, so its text is plain ASCII and has a limit. Whether llguidance takes it is
checked elsewhere (stages.models.grammar): nothing here needs that library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeinfer.core.errors import refuse
from pipeinfer.core.messages import MAX_GRAMMAR

FORM: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How a JSON text is written, as llguidance's options: on one line. Where any white space may come, some models end
none."""
OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of any JSON object."""


def schema_grammar(schema: Mapping[str, Any]) -> str:
    """The grammar of the JSON texts that ``schema``, a JSON schema, describes. ``x-guidance`` in it has llguidance's
    options instead of FORM. Raises UserError for what is no JSON."""
    return _text({"grammars": [{"json_schema": {"x-guidance": FORM, **schema}}]})


def regex_grammar(pattern: str) -> str:
    """The grammar of the texts that ``pattern``, a regular expression in Rust's syntax, matches as a whole. Raises
    UserError for one that is too long."""
    written, is_escaped = "", False
    for letter in pattern:  # a slash would end the expression, and it must be one line
        written += {"/": "/" if is_escaped else r"\/", "\n": "n" if is_escaped else r"\n"}.get(letter, letter)
        is_escaped = letter == "\\" and not is_escaped
    return _text({"grammars": [{"lark_grammar": f"start: /{written}/"}]})


def exact_grammar(grammar: str) -> str:
    """``grammar`` in the form in which it travels; empty if it is. Raises UserError for what is no JSON object."""
    if not grammar:
        return ""
    try:
        found = json.loads(grammar)
    except (ValueError, RecursionError) as error:
        refuse(f"a grammar that is not JSON ({str(error) or type(error).__name__})", "give llguidance's form as JSON")
    if not isinstance(found, dict):
        refuse("a grammar that is no JSON object", 'begin it with {"grammars": [')
    return _text(found)


def _text(grammar: Mapping[str, Any]) -> str:
    """``grammar`` as JSON, in its own order: that of a schema's properties matters."""
    try:
        text = json.dumps(grammar, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        refuse(f"a grammar that is not JSON ({str(error) or type(error).__name__})", "give what JSON can express")
    if len(text) > MAX_GRAMMAR:
        refuse(f"a grammar of {len(text)} bytes", f"use at most {MAX_GRAMMAR}")
    return text
