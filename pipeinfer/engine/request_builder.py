"""Builds requests: what a program asks becomes tokens, stop tokens and sampling settings that the job understands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launch.grammars import grammars_of
from launch.preflight import Cleared
from pipeinfer.core.config import Config
from pipeinfer.core.errors import UserError, refuse
from pipeinfer.core.grammar import exact_grammar
from pipeinfer.core.ports import Request, Sampling
from pipeinfer.core.sampling import checked_stops, exact
from pipeinfer.engine.generation import Generation, model_sampling
from pipeinfer.engine.prompt import Prompt, token_ids
from pipeinfer.text import Numbers, Reader, Text


@dataclass(frozen=True, slots=True)
class BuiltRequest:
    """A request for the job, and the strings ``stops`` that end its answer and are no single tokens."""

    request: Request
    stops: list[str]

    def settings(self) -> dict[str, Any]:
        """The settings as a Completion shows them: ``max_new_tokens``, ``sampling`` and ``stop``."""
        request = self.request
        return {"max_new_tokens": request.max_new_tokens, "sampling": asdict(request.sampling), "stop": self.stops}


class ContextExceeded(UserError):
    """Prompt and new tokens together are longer than the context."""


class RequestBuilder:
    """Builds requests for the job of ``config``. ``cleared``: what preflight found of its models.

    ``context``: most tokens of a request, prompt included. ``sampling``: the model's own settings, which count if a
    program gives none. ``ignored``: the names of its options that have no effect here. Raises CheckpointError for a
    tokenizer or a generation_config.json that is missing or damaged."""

    def __init__(self, config: Config, cleared: Cleared) -> None:
        spec, _ = cleared.target
        directory, forced = config.target_directory, bool(config.forced_acceptance)
        self.context = cleared.context
        self._vocab_size = spec.vocab_size
        self._text = (Numbers if forced else Text)(config.tokenizer_directory)
        self._stop_tokens = frozenset() if forced else self._text.eos_tokens | frozenset(spec.eos_tokens)
        self._grammars = None if forced else grammars_of(config.tokenizer_directory, spec)
        defaults = Generation() if forced else model_sampling(directory)
        self.sampling, self.ignored = defaults.sampling, defaults.ignored

    def build(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        ignore_eos: bool = False,
        chat: bool = False,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        priority: int = 0,
    ) -> BuiltRequest:
        """Build the request; for the arguments see Engine.submit. Raises UserError for what cannot be served."""
        tokens = self.tokenize(prompt, max_new_tokens, chat)
        drawn = exact(self.sampling if sampling is None else sampling)
        if max_new_tokens < 1 and drawn.prompt_logprobs is None:
            refuse(f"{max_new_tokens} new tokens", "ask for at least one, or for prompt_logprobs")
        stop_tokens, stops = set() if ignore_eos else set(self._stop_tokens), list[str]()
        for text in checked_stops(stop):
            token = self._text.special_stop(text)
            if token is None:
                stops.append(text)
            else:
                stop_tokens.add(token)
        if drawn.grammar and ignore_eos:
            refuse("a grammar with ignore_eos", "leave ignore_eos out: the answer ends where the grammar does")
        self.check_grammar(drawn.grammar)
        request = Request(tuple(tokens), max_new_tokens, frozenset(stop_tokens), drawn, priority)
        return BuiltRequest(request, stops)

    def check_grammar(self, grammar: str) -> None:
        """Raise UserError if ``grammar`` (see core.grammar) cannot be followed."""
        grammar = exact_grammar(grammar)
        if not grammar:
            return
        if self._grammars is None:
            refuse("a grammar for tokens that mean nothing", "leave out --forced-acceptance")
        self._grammars.check(grammar)

    def reader(self, built: BuiltRequest) -> Reader:
        """Return a new reader of the answer to ``built``."""
        return self._text.reader(built.request.stop_tokens, built.stops, built.request.prompt)

    def tokenize(self, prompt: Prompt, max_new_tokens: int, chat: bool = False) -> list[int]:
        """The prompt's tokens; see Engine.tokenize. Raises UserError for a prompt that cannot be served."""
        if isinstance(prompt, str):
            prompt = self._text.encode_chat(prompt) if chat else self._text.encode(prompt)
        elif chat:
            refuse("a chat of token ids", "give text, or leave chat out")
        tokens = token_ids(prompt, self._vocab_size)
        if not tokens:
            refuse("the prompt is empty", "give at least one token of text")
        if max_new_tokens < 0:
            refuse(f"{max_new_tokens} new tokens", "ask for at least one")
        if len(tokens) + max_new_tokens > self.context:
            raise ContextExceeded(
                f"the prompt's {len(tokens)} tokens and {max_new_tokens} new ones exceed the context of "
                f"{self.context}; shorten the prompt, ask for fewer tokens, or raise --context where the model allows"
            )
        return tokens

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation; see Engine.tokenize_chat."""
        return self._text.encode_messages(messages)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special tokens left out."""
        return self._text.decode(list(tokens))
