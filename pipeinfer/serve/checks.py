"""Checks of the fields of a request body, one at a time. Each refusal names the field."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from pipeinfer.serve.errors import invalid

MOST_SHOWN = 60  # characters of a name or value that an error message repeats

ANY = object()
"""Stands for every value, in a list of the values that change nothing."""

Neutral = Mapping[str, tuple[object, ...]]
"""Fields that are not supported, with the values that change nothing; null is always one."""


def read_object(data: bytes) -> dict[str, Any]:
    """The fields of the JSON object ``data``. Raises ApiError (400) for anything else."""
    try:
        fields = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise invalid(None, f"the body is not JSON ({str(error) or type(error).__name__})") from None
    if not isinstance(fields, dict):
        raise invalid(None, "the body is not a JSON object")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def shown(value: object) -> str:
    """``value`` as JSON, the beginning of a long one."""
    try:
        said = json.dumps(value)
    except RecursionError:
        return "a deeply nested value"
    return said if len(said) <= MOST_SHOWN else said[:MOST_SHOWN] + "..."


def take(fields: Mapping[str, Any], name: str, kinds: tuple[type, ...], what: str, default: Any = None) -> Any:
    """The value of a field, which must be ``what``; ``default`` where it is absent or null."""
    value = fields.get(name)
    if value is None:
        return default
    if int in kinds and float not in kinds:
        value = as_whole(value)
    if type(value) not in kinds:  # True is no number
        raise invalid(name, f"{name} must be {what}, not {shown(value)}")
    return value


def as_whole(value: object) -> object:
    """``value``, as a whole number if it is one: to JSON Schema, and so to clients, 2.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def flag(fields: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """The value of a field that is true or false."""
    return bool(take(fields, name, (bool,), "true or false", default))


def whole(fields: Mapping[str, Any], name: str, least: int, most: int, default: int | None = None) -> int | None:
    """The value of a field that is a whole number from ``least`` to ``most``."""
    value: int | None = take(fields, name, (int,), "a whole number", default)
    if value is not None and not least <= value <= most:
        raise invalid(name, f"{name} must be from {least} to {most}, not {shown(value)}")
    return value


def number(fields: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    """The value of a field that is a number from ``least`` to ``most``."""
    value: float | None = take(fields, name, (int, float), "a number")
    if value is None:
        return None
    if not least <= value <= most:
        raise invalid(name, f"{name} must be from {least:g} to {most:g}, not {shown(value)}")
    return float(value)


def refuse_others(fields: Mapping[str, Any], supported: Collection[str], neutral: Neutral) -> None:
    """Refuse fields that are not ``supported``, but for their ``neutral`` values; and fields that nobody knows."""
    for name, value in fields.items():
        if name in supported or (name in neutral and _is_neutral(value, neutral[name])):
            continue
        what = f"{name}={shown(value)} is not supported" if name in neutral else f"unknown field {shown(name)}"
        raise invalid(name[:MOST_SHOWN], f"{what}; leave it out")


def _is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    return value is None or any(
        same is ANY or (value == same and isinstance(value, bool) == isinstance(same, bool)) for same in neutral
    )
