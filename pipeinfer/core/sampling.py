"""How tokens are drawn: what may be asked, checked and put into the form in which every rank has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeinfer.core.errors import refuse
from pipeinfer.core.grammar import exact_grammar
from pipeinfer.core.messages import MAX_BIASES, MAX_TOP, NO_TOKEN, Settings, TokenBias

LEAST, MOST = float(np.float32(1e-5)), 1e5
"""Bounds of temperature and penalty; within them no score leaves the range of 32-bit numbers."""
MOST_PENALTY = 2.0
"""Of presence and frequency, either way; as at OpenAI."""
MOST_BIAS = 100.0
"""Of a token's logit, either way; as at OpenAI."""
MOST_STOPS = 16
"""Stop strings of one request."""


SampledToken = tuple[int, float]
"""A token and its log-probability (natural log)."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the target's next token is drawn from its logits; the names and their order are those of transformers.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``repetition_penalty`` 1 change nothing. The
    noise of a draw depends on ``seed`` (64 bits) and the drawn token's position alone.

    As at OpenAI: the logit of each generated token is lowered by ``presence_penalty``, and by ``frequency_penalty`` for
    each time that it was generated; ``logit_bias``: pairs of a token and what is added to its logit. ``top_logprobs``:
    how many of the most probable tokens by the model's own logits are wanted beside each token. ``prompt_logprobs``
    (as in vLLM): the same beside each token of the prompt, and with it that token's own log-probability; None: neither.

    ``grammar``: tokens that would contradict it are never drawn; llguidance's JSON (see core.grammar), or empty. It
    begins with the first generated token.

    ``prompt_length``: tokens from this position on count as generated; part of a sequence's Settings, not of what a
    user asks for."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int = 0
    prompt_length: int = 0
    prompt_logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str = ""

    @property
    def penalises_generated(self) -> bool:
        """Whether the generated tokens matter, and how often each was."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_generated(self) -> bool:
        """Whether a draw must know the generated tokens."""
        return self.penalises_generated or bool(self.grammar)

    def settings(self, sequence: int, prompt_length: int) -> Settings:
        """As it travels, for the tokens of ``sequence``, whose request has a prompt of ``prompt_length`` tokens."""
        first = (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.seed)
        of_prompt = -1 if self.prompt_logprobs is None else self.prompt_logprobs
        rest = (self.presence_penalty, self.frequency_penalty, self.top_logprobs, prompt_length, of_prompt)
        biases = tuple([TokenBias(*pair) for pair in self.logit_bias])
        return Settings(sequence, *first, *rest, biases, tuple(self.grammar.encode("ascii")))

    @classmethod
    def of(cls, settings: Settings) -> Sampling:
        """The sampling of ``settings``."""
        of_prompt = None if settings.prompt_logprobs < 0 else settings.prompt_logprobs
        return cls(*settings[1:-3], of_prompt, settings.logit_bias, bytes(settings.grammar).decode("latin-1"))

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Sampling:
        """What ``dataclasses.asdict`` made of one, JSON in between or not."""
        return cls(**{**found, "logit_bias": tuple([(token, bias) for token, bias in found["logit_bias"]])})


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """What a shard must know to choose after rows of one or several sequences. ``samplings``: of each row.
    ``positions``: int64 [rows], of the tokens to be drawn (one past their rows'). ``seen``: for each row the different
    tokens before the drawn one, int64 [any], without any where its sampling has no repetition penalty; () if no row's
    has one. ``generated``: for each row the generated tokens before the drawn one, int64 [any], in order and with
    repeats, where its sampling has a presence or frequency penalty or a grammar; likewise. ``is_guess``: a drafter
    asks, for what the target will draw. ``masks``: for each row which tokens its grammar allows, bool [vocabulary],
    without any where it has none; () if no row has one. Whoever knows the vocabulary adds them (stages.models.guided).
    ``given``: for each row the token that comes after it and is not drawn, NO_TOKEN where one is drawn; () if all are.
    """

    samplings: tuple[Sampling, ...]
    positions: npt.NDArray[np.int64]
    seen: tuple[npt.NDArray[np.int64], ...] = ()
    is_guess: bool = False
    generated: tuple[npt.NDArray[np.int64], ...] = ()
    masks: tuple[npt.NDArray[np.bool_], ...] = ()
    given: tuple[int, ...] = ()

    def gives(self, row: int) -> bool:
        """Whether the token after ``row`` is given."""
        return bool(self.given) and self.given[row] != NO_TOKEN

    def of(self, rows: Sequence[int]) -> SamplingInputs:
        """The draw of ``rows`` alone, in their order."""
        samplings = tuple([self.samplings[row] for row in rows])
        seen, generated = (tuple([each[row] for row in rows]) if each else () for each in (self.seen, self.generated))
        masks = tuple([self.masks[row] for row in rows]) if self.masks else ()
        given = tuple([self.given[row] for row in rows]) if self.given else ()
        return SamplingInputs(samplings, self.positions[list(rows)], seen, self.is_guess, generated, masks, given)


def exact(sampling: Sampling) -> Sampling:
    """``sampling`` with its numbers rounded to the 32 bits in which they travel, so that a rank that was sent them
    computes what one that was given them does. Raises UserError for numbers that nobody can mean."""
    given = (sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        temperature, top_p, min_p, penalty = np.array(given, np.float32).tolist()
    bounds = f"a number from {LEAST:g} to {MOST:g}"
    if not (temperature == 0 or LEAST <= temperature <= MOST):
        refuse(f"temperature {sampling.temperature:g}", f"use 0 (greedy) or {bounds}")
    if not 0 <= sampling.top_k < 2**31:
        refuse(f"top_k {sampling.top_k}", "use 0 (all tokens) or the number of tokens to draw from")
    if not 0 < top_p <= 1:
        refuse(f"top_p {sampling.top_p:g}", "use a number above 0, up to 1 (all tokens)")
    if not 0 <= min_p <= 1:
        refuse(f"min_p {sampling.min_p:g}", "use a number from 0 (all tokens) to 1")
    if not LEAST <= penalty <= MOST:
        refuse(f"repetition_penalty {sampling.repetition_penalty:g}", f"use 1 (none) or {bounds}")
    if not 0 <= sampling.seed < 2**64:
        refuse(f"seed {sampling.seed}", "use a whole number from 0 to 2^64 - 1")
    if not 0 <= sampling.top_logprobs <= MAX_TOP:
        refuse(f"top_logprobs {sampling.top_logprobs}", f"use a whole number from 0 to {MAX_TOP}")
    of_prompt = sampling.prompt_logprobs
    if of_prompt is not None and not 0 <= of_prompt <= MAX_TOP:
        refuse(f"prompt_logprobs {of_prompt}", f"use None (none) or a whole number from 0 to {MAX_TOP}")
    return Sampling(
        temperature,
        int(sampling.top_k),
        top_p,
        min_p,
        penalty,
        int(sampling.seed),
        _exact_penalty("presence_penalty", sampling.presence_penalty),
        _exact_penalty("frequency_penalty", sampling.frequency_penalty),
        int(sampling.top_logprobs),
        sampling.prompt_length,
        None if of_prompt is None else int(of_prompt),
        _exact_biases(sampling.logit_bias),
        exact_grammar(sampling.grammar),
    )


def _exact_penalty(name: str, value: float) -> float:
    if not -MOST_PENALTY <= value <= MOST_PENALTY:
        refuse(f"{name} {value:g}", f"use a number from {-MOST_PENALTY:g} to {MOST_PENALTY:g}")
    return float(np.float32(value))


def _exact_biases(biases: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """``biases`` in the order of their tokens."""
    if len(biases) > MAX_BIASES:
        refuse(f"a logit_bias of {len(biases)} tokens", f"use at most {MAX_BIASES}")
    if len(dict(biases)) < len(biases):
        refuse("a logit_bias that names a token twice", "give each token once")
    for token, bias in biases:
        if not 0 <= token < 2**31:
            refuse(f"logit_bias of token {token}", "use token ids of the model")
        if not -MOST_BIAS <= bias <= MOST_BIAS:
            refuse(f"logit_bias {bias:g} of token {token}", f"use a number from {-MOST_BIAS:g} to {MOST_BIAS:g}")
    return tuple(sorted([(int(token), float(np.float32(bias))) for token, bias in biases]))


def checked_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The strings that end an answer. Raises UserError where they cannot."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MOST_STOPS:
        refuse(f"{len(stops)} stop strings", f"use at most {MOST_STOPS}")
    for text in stops:
        if not text:
            refuse("an empty stop string", "leave it out, or give the text to stop at")
        try:
            text.encode()
        except UnicodeEncodeError:
            refuse(f"the stop string {text!r} is not UTF-8 text", "convert it, for instance with iconv")
    return stops
