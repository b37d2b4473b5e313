"""Prompts and conversations in a request body."""

from __future__ import annotations

from typing import cast

from pipeinfer.serve.checks import MOST_SHOWN, as_whole, shown
from pipeinfer.serve.errors import invalid

ROLES = ("system", "developer", "user", "assistant")

TextOrTokens = str | list[int]


def prompts(value: object) -> list[TextOrTokens]:
    """The prompts of a completion: one text, or one list of token ids, or a list of either."""
    several = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    return [_prompt(one, "prompt" if len(several) == 1 else f"prompt[{index}]") for index, one in enumerate(several)]


def _prompt(value: object, place: str) -> TextOrTokens:
    if isinstance(value, str):
        return value
    return token_list(value, "prompt", f"{place} must be a text or a list of token ids")


def token_list(value: object, name: str, rule: str = "") -> list[int]:
    """The token ids in field ``name``. ``rule``: what an error says that the value must be."""
    tokens = [as_whole(token) for token in value] if isinstance(value, list) else [None]
    if not all(type(token) is int for token in tokens):
        raise invalid(name, f"{rule or f'{name} must be a list of token ids'}, not {shown(value)}")
    return cast(list[int], tokens)


def messages(value: object) -> list[dict[str, str]]:
    """The messages of a conversation, each with a ``role`` and a ``content``."""
    if not isinstance(value, list) or not value:
        raise invalid("messages", "messages must be a list of at least one message")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(value: object, place: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise invalid(place, f"{place} must be an object with role and content")
    role = value.get("role")
    if role not in ROLES:
        raise invalid(f"{place}.role", f"{place}.role must be one of {', '.join(ROLES)}, not {shown(role)}")
    for name, said in value.items():
        if name not in ("role", "content") and said not in (None, "", []):
            raise invalid(f"{place}.{name[:MOST_SHOWN]}", f"{place}: {shown(name)} is not supported; leave it out")
    content = _content(value.get("content"), f"{place}.content")
    return {"role": "system" if role == "developer" else role, "content": content}


def _content(value: object, place: str) -> str:
    """The text of a message, which may come in parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise invalid(place, f"{place} must be a text or a list of parts")
    texts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            where = f"{place}[{index}]"
            raise invalid(f"{where}.type", f"{where} is not of type text; other parts are not supported")
        if not isinstance(part.get("text"), str):
            raise invalid(f"{place}[{index}].text", f"{place}[{index}].text must be a text")
        texts.append(part["text"])
    return "\n".join(texts)
