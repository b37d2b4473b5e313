"""Typed access to a quantisation's configuration; what it holds may be damaged."""

from __future__ import annotations

import re
from typing import Any

from stages.quantization.scheme import quoted, refuse

CORRECT = "correct it or export the model again"


class Settings:
    """A JSON object. Every method raises SchemeError, which names ``within`` and the key."""

    def __init__(self, content: Any, within: str) -> None:
        self.within = within
        if not isinstance(content, dict):
            refuse(f"{within} must be an object, not {quoted(content)}", CORRECT)
        self.content: dict[str, Any] = content

    def first(self, *keys: str, default: Any = None) -> Any:
        """The value of the first of ``keys`` that is there and not null."""
        found = [self.content[key] for key in keys if self.content.get(key) is not None]
        return found[0] if found else default

    def bits(self, *keys: str, among: tuple[int, ...]) -> int:
        """A number of bits, one of ``among``."""
        value = self.first(*keys)
        if type(value) is not int or value not in among:
            can = " or ".join(map(str, among))
            refuse(f"{self.within}.{keys[0]} {quoted(value)} is not supported", f"use a release of {can} bits")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.first(key, default=default)
        if type(value) is not bool:
            refuse(f"{self.within}.{key} must be true or false, not {quoted(value)}", CORRECT)
        return value

    def texts(self, *keys: str) -> tuple[str, ...]:
        """A list of texts; none where it is absent."""
        value = self.first(*keys, default=[])
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            refuse(f"{self.within}.{keys[0]} must be a list of names, not {quoted(value)}", CORRECT)
        return tuple(value)

    def inner(self, key: str) -> Settings | None:
        """The object under ``key``; None where it is absent or null."""
        value = self.content.get(key)
        return None if value is None else Settings(value, f"{self.within}.{key}")


def compiled(pattern: str, within: str) -> re.Pattern[str]:
    """A regular expression of the configuration."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        refuse(f"{within} has a damaged regular expression {quoted(pattern)} ({quoted(str(error))})", CORRECT)
