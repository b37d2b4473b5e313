"""The fields of a request body: read, checked and turned into what the engine takes.

A field that would change the answer and that the engine does not support is refused by name, unless it has the value
that changes nothing. A field that nobody knows is refused, too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from pipeinfer.core.errors import UserError
from pipeinfer.core.ports import GREEDY
from pipeinfer.core.sampling import checked_stops, exact
from pipeinfer.serve.errors import ApiError, invalid

DEFAULT_MODEL = "default"
"""The id by which the model can always be asked for."""
COMPLETION_TOKENS = 16
"""New tokens of a completion that does not say how many, as at OpenAI. A chat has what is left of the context."""
SAMPLING: dict[str, tuple[type, ...]] = {
    "temperature": (float, int),
    "top_p": (float, int),
    "min_p": (float, int),
    "repetition_penalty": (float, int),
    "top_k": (int,),
    "seed": (int,),
}
ROLES = ("system", "developer", "user", "assistant")
MOST_SHOWN = 60  # characters of a name that an error message repeats

ANY = object()
# Fields that are not supported, with the values that change nothing; null is always one. ANY: no value does.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "user": (ANY,),
    "metadata": (ANY,),
    "safety_identifier": (ANY,),
    "prompt_cache_key": (ANY,),
}
_NEUTRAL_COMPLETION: dict[str, tuple[object, ...]] = {"echo": (False,), "best_of": (1,), "suffix": ("",)}
_NEUTRAL_CHAT: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (ANY,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "top_logprobs": (0,),
}
_SUPPORTED = {
    "model", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop", "logprobs", "ignore_eos",
    *SAMPLING,
}  # fmt: skip
_NEUTRAL_STREAM_OPTIONS: dict[str, tuple[object, ...]] = {
    "include_obfuscation": (False,),
    "continuous_usage_stats": (False,),
}


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One request. ``prompt``: text or token ids; ``messages``: those of a chat, which has no prompt. ``sampling``: the
    sampling settings that were given. ``max_new_tokens``: None if nothing was said."""

    prompt: str | list[int] = ""
    messages: list[dict[str, str]] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stream: bool = False
    include_usage: bool = False
    with_logprobs: bool = False


def parse(data: bytes, is_chat: bool, models: tuple[str, ...]) -> ApiRequest:
    """The request in the body ``data``, for one of ``models``. Raises ApiError: 404 for another model, 400 for whatever
    else cannot be served."""
    fields = _read_object(data)
    model = _take(fields, "model", (str,), "a text", models[0])
    if model not in models:
        known = " or ".join(map(_shown, models))
        raise ApiError(404, f"the model {_shown(model)} does not exist; use {known}", "model", "model_not_found")
    name = "messages" if is_chat else "prompt"
    _refuse_others(fields, _SUPPORTED | {name}, _NEUTRAL | (_NEUTRAL_CHAT if is_chat else _NEUTRAL_COMPLETION))
    stream = _take(fields, "stream", (bool,), "true or false", False)
    return ApiRequest(
        prompt="" if is_chat else _prompt(fields.get(name)),
        messages=_messages(fields.get(name)) if is_chat else None,
        sampling=_sampling(fields),
        max_new_tokens=_limit(fields),
        stop=_stop(fields.get("stop")),
        ignore_eos=_take(fields, "ignore_eos", (bool,), "true or false", False),
        stream=stream,
        include_usage=_include_usage(fields, stream),
        with_logprobs=_with_logprobs(fields, is_chat),
    )


def _read_object(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise invalid(None, f"the body is not JSON ({str(error) or type(error).__name__})") from None
    if not isinstance(fields, dict):
        raise invalid(None, "the body is not a JSON object")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _shown(value: object) -> str:
    """``value`` as JSON, the beginning of a long one."""
    said = json.dumps(value)
    return said if len(said) <= MOST_SHOWN else said[:MOST_SHOWN] + "..."


def _take(fields: Mapping[str, Any], name: str, kinds: tuple[type, ...], what: str, default: Any = None) -> Any:
    """The value of a field, which must be ``what``; ``default`` where it is absent or null."""
    value = fields.get(name)
    if value is None:
        return default
    if type(value) not in kinds:  # True is no number
        raise invalid(name, f"{name} must be {what}, not {_shown(value)}")
    return value


def _is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    return value is None or any(
        same is ANY or (value == same and isinstance(value, bool) == isinstance(same, bool)) for same in neutral
    )


def _refuse_others(fields: Mapping[str, Any], supported: set[str], neutral: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse fields that are not ``supported``, but for their ``neutral`` values."""
    for name, value in fields.items():
        if name in supported or _is_neutral(value, neutral.get(name, ())):
            continue
        what = f"{name}={_shown(value)} is not supported" if name in neutral else f"unknown field {_shown(name)}"
        raise invalid(name[:MOST_SHOWN], f"{what}; leave it out")


def _limit(fields: Mapping[str, Any]) -> int | None:
    """The most new tokens, under its new or its old name."""
    for name in ("max_completion_tokens", "max_tokens"):
        limit: int | None = _take(fields, name, (int,), "a whole number")
        if limit is not None and limit < 1:
            raise invalid(name, f"{name} must be at least 1, not {limit}")
        if limit is not None:
            return limit
    return None


def _sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling settings that are given, each within its bounds."""
    given: dict[str, Any] = {}
    for name, kinds in SAMPLING.items():
        value = _take(fields, name, kinds, "a number" if float in kinds else "a whole number")
        if value is None:
            continue
        if name == "seed" and -(2**63) <= value < 0:
            value += 2**64  # OpenAI's seeds are signed
        try:
            given[name] = float(value) if float in kinds else value
            exact(replace(GREEDY, **{name: given[name]}))
        except OverflowError:
            raise invalid(name, f"{name} is too large") from None
        except UserError as error:
            raise invalid(name, str(error)) from None
    return given


def _stop(value: object) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("stop", f"stop must be a text or a list of texts, not {_shown(value)}")
    try:
        return checked_stops(stops)
    except UserError as error:
        raise invalid("stop", str(error)) from None


def _include_usage(fields: Mapping[str, Any], stream: bool) -> bool:
    options = _take(fields, "stream_options", (dict,), "an object")
    if options is None:
        return False
    if not stream:
        raise invalid("stream_options", "stream_options needs stream: true")
    _refuse_others(options, {"include_usage"}, _NEUTRAL_STREAM_OPTIONS)
    return bool(_take(options, "include_usage", (bool,), "true or false", False))


def _with_logprobs(fields: Mapping[str, Any], is_chat: bool) -> bool:
    """Whether the chosen tokens' log-probabilities are wanted; there are none of other tokens."""
    if is_chat:
        return bool(_take(fields, "logprobs", (bool,), "true or false", False))
    most = _take(fields, "logprobs", (int,), "a whole number")
    if most not in (None, 0):
        raise invalid("logprobs", "log-probabilities are those of the chosen tokens only; use logprobs: 0")
    return most is not None


def _prompt(value: object) -> str | list[int]:
    """Text or token ids; a list of one of them is taken for the one."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        raise invalid("prompt", f"{len(value)} prompts at once are not supported; send one request for each")
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise invalid("prompt", f"prompt must be a text or a list of token ids, not {_shown(value)}")
    return value


def _messages(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise invalid("messages", "messages must be a list of at least one message")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(value: object, place: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise invalid(place, f"{place} must be an object with role and content")
    role = value.get("role")
    if role not in ROLES:
        raise invalid(f"{place}.role", f"{place}.role must be one of {', '.join(ROLES)}, not {_shown(role)}")
    for name, said in value.items():
        if name not in ("role", "content") and said not in (None, "", []):
            raise invalid(f"{place}.{name[:MOST_SHOWN]}", f"{place}: {_shown(name)} is not supported; leave it out")
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
