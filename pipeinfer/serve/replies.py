"""OpenAI's response objects: whole answers, and the chunks of a stream."""

from __future__ import annotations

import itertools
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pipeinfer.serve.fields import ApiRequest
from pipeinfer.serve.served import Served

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LEAST_LOGPROB = -9999.0  # JSON has no infinity

Decode = Callable[[Sequence[int]], str]
Told = tuple[str, float | None, list[tuple[str, float]]]
"""A token's text, its log-probability (None for a prompt's first token), and the same of its alternatives."""


class TokenTexts:
    """The text of each token of an answer, one after another. ``decode`` gives the text of tokens; ``previous``: the
    prompt's last token, for some tokenizers drop the blank before the first word; None: they begin with the prompt."""

    def __init__(self, decode: Decode, previous: int | None) -> None:
        self._decode = decode
        self._previous = [] if previous is None else [previous]
        self._before = decode(self._previous) if self._previous else ""

    def next(self, token: int) -> str:
        """The text of ``token``."""
        text = self.of(token)
        self._previous, self._before = [token], self._decode([token])
        return text

    def of(self, token: int) -> str:
        """The text of a ``token`` that might come next. A part of a character is the replacement character."""
        before, text = self._before, self._decode([*self._previous, token])
        is_apart = text.startswith(before) and REPLACEMENT not in text
        return text[len(before) :] if is_apart else self._decode([token])


class Choice:
    """What has been told of the choice ``index``, which ``served`` gives. ``owes_prompt``: log-probabilities of the
    prompt are to be told first."""

    def __init__(self, index: int, served: Served, decode: Decode, owes_prompt: bool) -> None:
        self.index, self.owes_prompt, self._served = index, owes_prompt, served
        self._texts = TokenTexts(decode, None if owes_prompt else served.completion.prompt_tokens[-1])
        self._told = 0  # tokens whose log-probabilities have been given
        self.offset = 0  # characters of their texts

    def untold(self, with_tops: bool) -> list[Told]:
        """The tokens that have come since this was asked last, those of an echoed prompt before all others;
        ``with_tops``: with their alternatives. The engine's thread adds a token to one list after the other."""
        completion, first, told = self._served.completion, self._told, list[Told]()
        if self.owes_prompt:
            self.owes_prompt = False
            tops = completion.prompt_top_logprobs if with_tops else itertools.repeat(())
            told += self._of(completion.prompt_tokens, completion.prompt_logprobs, tops)
        tops = completion.top_logprobs[first:] if with_tops else itertools.repeat(())
        new = self._of(completion.tokens[first:], completion.logprobs[first:], tops)
        self._told += len(new)
        return told + new

    def _of(
        self, tokens: Sequence[int], logprobs: Sequence[float | None], tops: Iterable[Sequence[tuple[int, float]]]
    ) -> list[Told]:
        told = []
        for token, logprob, top in zip(tokens, logprobs, tops, strict=False):
            others = [(self._texts.of(other), _finite(value)) for other, value in top]
            told.append((self._texts.next(token), None if logprob is None else _finite(logprob), others))
        return told


class Reply(ABC):
    """Makes the response objects of one request, for which ``answers`` are decoded."""

    prefix = kind = chunk_kind = ""

    def __init__(self, model: str, answers: Sequence[Served], asked: ApiRequest, decode: Decode) -> None:
        self._answers, self._asked = answers, asked
        self._choices = {
            served: [Choice(index, served, decode, asked.scores_prompt) for index in served.indices]
            for served in answers
        }
        self._shared = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self) -> dict[str, Any]:
        """The answers as one object."""
        choices = [
            self._choice(choice, self._said(served, served.completion.text), served.completion.finish_reason)
            for served in self._answers
            for choice in self._choices[served]
        ]
        return self._object(self.kind, choices) | {"usage": self._usage(), "metrics": self._metrics()}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks that come before any text."""
        return []

    def chunks(self, served: Served, piece: str, finish_reason: str | None = None) -> list[dict[str, Any]]:
        """The chunks with ``piece`` more of the text that ``served`` gives."""
        delta = self._delta(piece)
        return [self._chunk([self._choice(choice, delta, finish_reason)]) for choice in self._choices[served]]

    def closing(self) -> list[dict[str, Any]]:
        """The chunks that come after all text."""
        if not self._asked.usage:
            return []
        told = {"usage": self._usage(), "metrics": self._metrics()}
        return [self._object(self.chunk_kind, []) | told]

    @abstractmethod
    def _said(self, served: Served, text: str) -> dict[str, Any]:
        """The fields of a choice for the whole ``text``."""

    @abstractmethod
    def _delta(self, piece: str) -> dict[str, Any]:
        """The fields of a choice for a ``piece`` of text."""

    @abstractmethod
    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        """What is told of the log-probabilities of tokens that are new."""

    def _choice(self, choice: Choice, said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        logprobs = None if self._asked.logprobs is None else self._logprobs(choice)
        return {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": finish_reason}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._shared["id"], "object": kind, **self._shared, "choices": choices}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": self._usage() if self._asked.continuous_usage else None} if self._asked.usage else {}
        return self._object(self.chunk_kind, choices) | usage

    def _every(self) -> Iterable[tuple[Served, Choice]]:
        return ((served, choice) for served in self._answers for choice in self._choices[served])

    def _usage(self) -> dict[str, int]:
        """How many tokens the prompts, each counted once, and the choices have so far."""
        prompts = {served.indices.start // self._asked.n: served.completion.prompt_tokens for served in self._answers}
        prompt = sum(map(len, prompts.values()))
        new = sum(len(served.completion.tokens) for served, _ in self._every())
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _metrics(self) -> dict[str, Any] | None:
        """vLLM's block of this name, which is about responses with one choice."""
        (served, _), *others = self._every()
        speculation = None if others else served.speculation()
        return None if speculation is None else {"speculative_decoding": speculation}


class TextReply(Reply):
    """Answers of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def opening(self) -> list[dict[str, Any]]:
        """See Reply. The prompts, where they are to be repeated without log-probabilities, which come later."""
        if self._asked.scores_prompt:
            return []
        echoed = [served for served in self._answers if served.prompt]
        return [chunk for served in echoed for chunk in self.chunks(served, served.prompt or "")]

    def chunks(self, served: Served, piece: str, finish_reason: str | None = None) -> list[dict[str, Any]]:
        """See Reply. The first one repeats a prompt of which log-probabilities are told (as in vLLM)."""
        owes_prompt = any(choice.owes_prompt for choice in self._choices[served])
        return super().chunks(served, (served.prompt or "") + piece if owes_prompt else piece, finish_reason)

    def _said(self, served: Served, text: str) -> dict[str, Any]:
        return {"text": (served.prompt or "") + text}

    def _delta(self, piece: str) -> dict[str, Any]:
        return {"text": piece}

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        told, offsets = choice.untold(bool(self._asked.logprobs)), []
        for text, _, _ in told:
            offsets.append(choice.offset)
            choice.offset += len(text)
        alternatives = [
            None if logprob is None else {text: logprob} | dict(others) for text, logprob, others in told
        ]
        tops = alternatives if self._asked.logprobs else None
        return {
            "tokens": [text for text, _, _ in told],
            "token_logprobs": [logprob for _, logprob, _ in told],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


class ChatReply(Reply):
    """Answers of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        """See Reply."""
        said = {"delta": {"role": "assistant", "content": ""}}
        return [
            self._chunk([{"index": choice.index, **said, "logprobs": None, "finish_reason": None}])
            for _, choice in self._every()
        ]

    def _said(self, served: Served, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None, "annotations": []}}

    def _delta(self, piece: str) -> dict[str, Any]:
        return {"delta": {"content": piece} if piece else {}}

    def _logprobs(self, choice: Choice) -> dict[str, Any]:
        told = [
            _spelled(text, logprob) | {"top_logprobs": [_spelled(*other) for other in others]}
            for text, logprob, others in choice.untold(bool(self._asked.logprobs))
        ]
        return {"content": told, "refusal": None}


def _spelled(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": None if REPLACEMENT in text else list(text.encode())}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
