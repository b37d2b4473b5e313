"""OpenAI's response objects: whole answers, and the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pipeinfer.engine.answer import Completion

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LEAST_LOGPROB = -9999.0  # JSON has no infinity


class TokenTexts:
    """The text of each token of an answer, one after another. ``decode`` gives the text of tokens; ``previous``: the
    prompt's last token, for some tokenizers drop the blank before the first word."""

    def __init__(self, decode: Callable[[Sequence[int]], str], previous: int) -> None:
        self._decode, self._previous = decode, previous

    def next(self, token: int) -> str:
        """The text of ``token``. A part of a character is the replacement character."""
        before = self._decode([self._previous])
        text = self._decode([self._previous, token])
        self._previous = token
        is_apart = text.startswith(before) and REPLACEMENT not in text
        return text[len(before) :] if is_apart else self._decode([token])


class Reply(Protocol):
    """Makes the response objects of one request."""

    with_usage: bool  # whether chunks have a field for it

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The answer as one object."""
        ...

    def opening(self) -> list[dict[str, Any]]:
        """The chunks that come before any text."""
        ...

    def chunk(self, completion: Completion, piece: str, finish_reason: str | None = None) -> dict[str, Any]:
        """The chunk with the text ``piece``; ``completion`` has what is known so far."""
        ...

    def usage_chunk(self, completion: Completion) -> dict[str, Any]:
        """The last chunk, where usage was asked for."""
        ...


class _Reply:
    """What both kinds of answers have in common."""

    prefix = kind = chunk_kind = ""

    def __init__(self, model: str, texts: TokenTexts | None, with_usage: bool) -> None:
        """``model``: its name. ``texts``: where log-probabilities are wanted."""
        self.with_usage = with_usage
        self._texts = texts
        self._shared = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._told = 0  # tokens whose log-probabilities have been given

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._shared["id"], "object": kind, **self._shared, "choices": choices}

    def _choice(self, completion: Completion, said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        logprobs = None if self._texts is None else self._logprobs(self._untold(completion, self._texts))
        return {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish_reason}

    def _untold(self, completion: Completion, texts: TokenTexts) -> list[tuple[str, float]]:
        """Text and log-probability of the tokens that have come since this was asked last."""
        found = list(zip(completion.tokens[self._told :], completion.logprobs[self._told :], strict=False))
        self._told += len(found)
        return [(texts.next(token), max(logprob, LEAST_LOGPROB)) for token, logprob in found]

    def _logprobs(self, tokens: list[tuple[str, float]]) -> dict[str, Any]:
        raise NotImplementedError

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        return self._object(self.chunk_kind, choices) | ({"usage": usage} if self.with_usage else {})

    def usage_chunk(self, completion: Completion) -> dict[str, Any]:
        """See Reply."""
        return self._chunk([], usage(completion))


class TextReply(_Reply):
    """Answers of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    _offset = 0  # characters of the tokens' texts so far

    def whole(self, completion: Completion) -> dict[str, Any]:
        """See Reply."""
        choice = self._choice(completion, {"text": completion.text}, completion.finish_reason)
        return self._object(self.kind, [choice]) | {"usage": usage(completion)}

    def opening(self) -> list[dict[str, Any]]:
        """See Reply."""
        return []

    def chunk(self, completion: Completion, piece: str, finish_reason: str | None = None) -> dict[str, Any]:
        """See Reply."""
        return self._chunk([self._choice(completion, {"text": piece}, finish_reason)])

    def _logprobs(self, tokens: list[tuple[str, float]]) -> dict[str, Any]:
        offsets = []
        for text, _ in tokens:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": [text for text, _ in tokens],
            "token_logprobs": [logprob for _, logprob in tokens],
            "top_logprobs": None,
            "text_offset": offsets,
        }


class ChatReply(_Reply):
    """Answers of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, completion: Completion) -> dict[str, Any]:
        """See Reply."""
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        choice = self._choice(completion, {"message": message}, completion.finish_reason)
        return self._object(self.kind, [choice]) | {"usage": usage(completion)}

    def opening(self) -> list[dict[str, Any]]:
        """See Reply."""
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk([{"index": 0, **said, "logprobs": None, "finish_reason": None}])]

    def chunk(self, completion: Completion, piece: str, finish_reason: str | None = None) -> dict[str, Any]:
        """See Reply."""
        delta = {"content": piece} if piece else {}
        return self._chunk([self._choice(completion, {"delta": delta}, finish_reason)])

    def _logprobs(self, tokens: list[tuple[str, float]]) -> dict[str, Any]:
        told = [
            {
                "token": text,
                "logprob": logprob,
                "bytes": None if REPLACEMENT in text else list(text.encode()),
                "top_logprobs": [],
            }
            for text, logprob in tokens
        ]
        return {"content": told, "refusal": None}


def usage(completion: Completion) -> dict[str, int]:
    """How many tokens the prompt and the answer have."""
    prompt, new = len(completion.prompt_tokens), len(completion.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
