"""The fields of a request to decode: read, checked and turned into what the engine takes.

A field that would change the answer and that the engine does not support is refused by name, unless it has the value
that changes nothing. A field that nobody knows is refused, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeinfer.core.errors import UserError
from pipeinfer.core.sampling import checked_stops
from pipeinfer.serve.checks import ANY, Neutral, flag, read_object, refuse_others, shown, take, whole
from pipeinfer.serve.errors import ApiError, invalid
from pipeinfer.serve.grammar_fields import GRAMMARS, grammar
from pipeinfer.serve.prompts import TextOrTokens, messages, prompts
from pipeinfer.serve.sampling_fields import FIELDS, logprobs, sampling

DEFAULT_MODEL = "default"
"""The id by which the model can always be asked for."""
COMPLETION_TOKENS = 16
"""New tokens of a completion that does not say how many, as at OpenAI. A chat has what is left of the context."""
MOST_CHOICES = 128
"""Choices of one response, as at OpenAI."""
MOST_PRIORITY = 2**31 - 1
LIMITS = ("max_completion_tokens", "max_tokens")
"""The fields that say how many new tokens there may be. The first one counts."""

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "user": (ANY,),
    "metadata": (ANY,),
    "safety_identifier": (ANY,),
    "prompt_cache_key": (ANY,),
    "structured_outputs": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "prompt_logprobs": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
}
_NEUTRAL_COMPLETION: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "add_special_tokens": (True,),
}
_NEUTRAL_CHAT: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (ANY,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "echo": (False,),
}
_SUPPORTED = {
    "model", "n", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop", "logprobs", "ignore_eos",
    "priority", *FIELDS, *GRAMMARS,
}  # fmt: skip
_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats")
_NEUTRAL_STREAM_OPTIONS: dict[str, tuple[object, ...]] = {"include_obfuscation": (False,)}


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One request. ``prompts``: texts or token ids; ``messages``: those of a chat, which has no prompts. ``n``: choices
    for each prompt. ``sampling``: the sampling settings that were given. ``max_new_tokens``: None if nothing was said.
    ``usage`` and ``continuous_usage``: whether a stream tells how many tokens there were, at its end or in each chunk.
    ``logprobs``: of how many alternatives, None: of no token at all. ``echo``: the text begins with the prompt, and so
    do log-probabilities. ``priority``: lower ones go first.
    ``grammar``: what the answers must follow, and the field that says so; empty for nothing."""

    prompts: list[TextOrTokens] = field(default_factory=list)
    messages: list[dict[str, str]] | None = None
    n: int = 1
    sampling: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stream: bool = False
    usage: bool = False
    continuous_usage: bool = False
    logprobs: int | None = None
    echo: bool = False
    priority: int = 0
    grammar: tuple[str, str] = ("", "")

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are wanted."""
        return self.echo and self.logprobs is not None


def parse(data: bytes, is_chat: bool, models: tuple[str, ...]) -> ApiRequest:
    """The request in the body ``data``, for one of ``models``. Raises ApiError: 404 for another model, 400 for whatever
    else cannot be served."""
    fields = read_object(data)
    check_model(fields, models)
    own = {"messages", "top_logprobs"} if is_chat else {"prompt", "echo"}
    refuse_others(fields, _SUPPORTED | own, _neutral(is_chat))
    stream = flag(fields, "stream")
    usage, continuous = _stream_options(fields, stream)
    echo, told = not is_chat and flag(fields, "echo"), logprobs(fields, is_chat)
    asked = ApiRequest(
        prompts=[] if is_chat else prompts(fields.get("prompt")),
        messages=messages(fields.get("messages")) if is_chat else None,
        n=whole(fields, "n", 1, MOST_CHOICES) or 1,
        sampling=sampling(fields),
        max_new_tokens=_limit(fields, 0 if echo and told is not None else 1),
        stop=_stop(fields.get("stop")),
        ignore_eos=flag(fields, "ignore_eos"),
        stream=stream,
        usage=usage,
        continuous_usage=continuous,
        logprobs=told,
        echo=echo,
        priority=whole(fields, "priority", -MOST_PRIORITY, MOST_PRIORITY) or 0,
        grammar=grammar(fields),
    )
    if asked.ignore_eos and asked.grammar[0]:
        raise invalid("ignore_eos", f"ignore_eos with {asked.grammar[1]}: the answer ends where the grammar does")
    if len(asked.prompts) * asked.n > MOST_CHOICES:
        raise invalid("prompt", f"{len(asked.prompts)} prompts with n={asked.n}: at most {MOST_CHOICES} choices")
    return asked


def check_model(fields: Mapping[str, Any], models: tuple[str, ...]) -> None:
    """Raises ApiError (404) where the field ``model`` names none of ``models``; it may be absent."""
    model = take(fields, "model", (str,), "a text", models[0])
    if model not in models:
        known = " or ".join(map(shown, models))
        raise ApiError(404, f"the model {shown(model)} does not exist; use {known}", "model", "model_not_found")


def _neutral(is_chat: bool) -> Neutral:
    return _NEUTRAL | (_NEUTRAL_CHAT if is_chat else _NEUTRAL_COMPLETION)


def _limit(fields: Mapping[str, Any], least: int) -> int | None:
    """The most new tokens, under its new or its old name; at ``least`` so many."""
    limits: list[int] = []
    for name in LIMITS:
        limit = take(fields, name, (int,), "a whole number")
        if limit is not None and limit < least:
            other = ", or 0 with echo and logprobs" if limit == 0 else ""
            raise invalid(name, f"{name} must be at least {least}{other}, not {limit}")
        limits += [] if limit is None else [limit]
    return limits[0] if limits else None


def _stop(value: object) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("stop", f"stop must be a text or a list of texts, not {shown(value)}")
    try:
        return checked_stops(stops)
    except UserError as error:
        raise invalid("stop", str(error)) from None


def _stream_options(fields: Mapping[str, Any], stream: bool) -> tuple[bool, bool]:
    """Whether the last chunk, and whether every chunk, is to tell the usage."""
    options = take(fields, "stream_options", (dict,), "an object")
    if options is None:
        return False, False
    if not stream:
        raise invalid("stream_options", "stream_options needs stream: true")
    refuse_others(options, _STREAM_OPTIONS, _NEUTRAL_STREAM_OPTIONS)
    usage, continuous = (flag(options, name) for name in _STREAM_OPTIONS)
    return usage, usage and continuous
