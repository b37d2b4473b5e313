"""The fields of a request body that say how tokens are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipeinfer.core.errors import UserError
from pipeinfer.core.ports import GREEDY
from pipeinfer.core.sampling import LEAST, MOST, exact
from pipeinfer.serve.checks import number, shown, take, whole
from pipeinfer.serve.errors import invalid

NUMBERS: dict[str, tuple[type, ...]] = {
    "temperature": (float, int),
    "top_p": (float, int),
    "min_p": (float, int),
    "repetition_penalty": (float, int),
    "top_k": (int,),
    "seed": (int,),
}
BOUNDS = {"temperature": (LEAST, MOST), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (LEAST, MOST)}
"""Of numbers as they are given: rounded to 32 bits, one just outside would be inside. 0 has been checked before."""
PENALTIES = ("presence_penalty", "frequency_penalty")
FIELDS = {*NUMBERS, *PENALTIES, "logit_bias"}
"""The names of all fields that are read here, but for those of log-probabilities."""
MOST_PENALTY, MOST_BIAS, MOST_BIASES = 2.0, 100.0, 300  # as at OpenAI
MOST_TOP = 20
"""The most alternatives of a token whose log-probabilities may be asked for."""


def sampling(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling settings that are given, each within its bounds, under the names of Sampling."""
    given: dict[str, Any] = {}
    for name, kinds in NUMBERS.items():
        value = take(fields, name, kinds, "a number" if float in kinds else "a whole number")
        if value is None:
            continue
        if name == "seed" and -(2**63) <= value < 0:
            value += 2**64  # OpenAI's seeds are signed
        if name == "top_k" and value == -1:
            value = 0  # vLLM's word for all tokens
        try:
            given[name] = float(value) if float in kinds else value
            exact(dataclasses.replace(GREEDY, **{name: given[name]}))
        except OverflowError:
            raise invalid(name, f"{name} is too large") from None
        except UserError as error:
            raise invalid(name, str(error)) from None
        least, most = BOUNDS.get(name, (value, value))
        if value and not least <= value <= most:
            raise invalid(name, f"{name} must be from {least:g} to {most:g}, not {shown(value)}")
    for name in PENALTIES:
        if penalty := number(fields, name, -MOST_PENALTY, MOST_PENALTY):
            given[name] = penalty
    if biases := _logit_bias(fields):
        given["logit_bias"] = biases
    return given


def _logit_bias(fields: Mapping[str, Any]) -> tuple[tuple[int, float], ...]:
    """What is added to the logits of which tokens, by token."""
    given = take(fields, "logit_bias", (dict,), "an object from token ids to numbers", {})
    if len(given) > MOST_BIASES:
        raise invalid("logit_bias", f"logit_bias has {len(given)} tokens; use at most {MOST_BIASES}")
    biases = {}
    for name, bias in given.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            raise invalid("logit_bias", f"logit_bias: {shown(name)} is not a token id")
        if type(bias) not in (int, float) or not -MOST_BIAS <= bias <= MOST_BIAS:
            what = f"must be a number from {-MOST_BIAS:g} to {MOST_BIAS:g}"
            raise invalid("logit_bias", f"logit_bias: the bias of token {name} {what}, not {shown(bias)}")
        biases[int(name)] = float(bias)
    return tuple(sorted(biases.items()))


def logprobs(fields: Mapping[str, Any], is_chat: bool) -> int | None:
    """Of how many alternatives of each token log-probabilities are wanted, beside its own; None: not its own either."""
    if not is_chat:
        return whole(fields, "logprobs", 0, MOST_TOP)
    top = whole(fields, "top_logprobs", 0, MOST_TOP)
    if not take(fields, "logprobs", (bool,), "true or false", False):
        if top:
            raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
        return None
    return top or 0
