"""Requests between HTTP and the engine: bounds, submitting, and the end of all of them."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from launch.requests import JobOver
from pipeinfer.core.errors import PipeinferError, UserError
from pipeinfer.engine.engine import Engine
from pipeinfer.engine.request_builder import ContextExceeded
from pipeinfer.serve.errors import ApiError, invalid
from pipeinfer.serve.fields import COMPLETION_TOKENS, ApiRequest
from pipeinfer.serve.metrics import Metrics
from pipeinfer.serve.served import Served
from pipeinfer.text.files import refuse_no_template

T = TypeVar("T")
SEEDS = 2**64


class Front:
    """What the endpoints share. ``model``: the name of the model; ``max_queue``: the most requests that are decoded or
    wait to be, further ones are refused. ``on_idle``: called when the last request ends after ``close``.

    It is used on the thread of the HTTP server, but for ``open``, ``warm_up``, ``close``, ``is_busy`` and
    ``cancel_all``."""

    def __init__(self, model: str, max_queue: int, on_idle: Callable[[], object]) -> None:
        self.model = model
        self.metrics = Metrics(model)
        self.served = set[Served]()  # what the engine has and has not ended
        self._max_queue, self._on_idle = max_queue, on_idle
        self._engine: Engine | None = None
        self._is_closing = self._is_cancelling = False
        self._places = 0
        self._warm: Future[None] | None = None
        # One thread: tokenizers are not made for several, and a long prompt must not hold up the other answers.
        self._submitting = ThreadPoolExecutor(1, "pipeinfer submit")

    def open(self, engine: Engine) -> None:
        """From any thread: serve by ``engine`` from now on."""
        self._engine = engine

    def warm_up(self, engine: Engine) -> None:
        """From any thread: have what the first chat needs loaded, in the background. Chats wait for that: transformers
        cannot be imported by two threads at once."""
        self._warm = Future()
        threading.Thread(target=self._warm_up, args=(engine, self._warm), name="pipeinfer warm up", daemon=True).start()

    def _warm_up(self, engine: Engine, warm: Future[None]) -> None:
        try:
            refuse_no_template(engine.config.tokenizer_directory)
            _ = importlib.import_module("transformers").AutoTokenizer  # takes seconds; completions do not wait
            self._submitting.submit(engine.tokenize_chat, [{"role": "user", "content": "x"}])
        except (PipeinferError, ImportError, RuntimeError):
            pass  # the first chat says why; or the server has ended
        finally:
            warm.set_result(None)

    async def warmed(self) -> None:
        """Wait for what ``warm_up`` loads."""
        if self._warm is not None and not self._warm.done():
            await asyncio.shield(asyncio.wrap_future(self._warm))

    def close(self) -> None:
        """From any thread: refuse requests from now on; those that were taken go on."""
        self._is_closing = True

    @property
    def is_busy(self) -> bool:
        """Whether requests have not ended."""
        return self._places > 0

    @property
    def waiting(self) -> int:
        """How many sequences wait to be tokenized or to be decoded."""
        untold = self._places - len(self.served)
        return max(0, untold) + self._open_ones() - self.running

    @property
    def running(self) -> int:
        """How many sequences the engine decodes now."""
        most = 1 if self._engine is None else self._engine.config.max_num_seqs
        return min(self._open_ones(), most)

    def _open_ones(self) -> int:
        """How many sequences the engine has not ended; others may still be sent to their clients."""
        return sum(not served.completion.finish_reason for served in self.served)

    @property
    def runs_in_flight(self) -> int:
        """How many runs the pipeline held at the last emission of a request that is being decoded."""
        return self._last_load()[0]

    @property
    def kv_usage(self) -> float:
        """Which share of the KV slots was in use then (see Orchestrator)."""
        return self._last_load()[1]

    def _last_load(self) -> tuple[int, float]:
        going_on = [one for one in self.served if not one.completion.finish_reason]
        emitted = [(one.emitted_at, one.runs_in_flight, one.kv_usage) for one in going_on if one.emitted_at is not None]
        return max(emitted, default=(0.0, 0, 0.0))[1:]

    @property
    def state(self) -> str:
        """What a person is told: ``loading``, ``ready``, ``ending`` or ``failed``."""
        if self._engine is None:
            return "loading"
        if self._engine.failure is not None:
            return "failed"
        return "ending" if self._is_closing else "ready"

    def ranks(self) -> list[dict[str, Any]]:
        """See Engine; none while it loads, and once it has ended."""
        try:
            return [] if self._engine is None else self._engine.ranks
        except UserError:
            return []

    def cancel_all(self) -> None:
        """From any thread: close, and cancel what has not ended."""
        self._is_closing = self._is_cancelling = True
        for served in list(self.served):
            served.handle.cancel()

    def engine(self) -> Engine:
        """The engine. Raises ApiError (503) while it loads, when it has failed, and when the server ends."""
        if self._is_closing:
            raise ApiError(503, "the server is shutting down")
        if self._engine is None:
            raise ApiError(503, "the model is being loaded")
        if self._engine.failure is not None:
            raise ApiError(503, f"the engine has failed: {self._engine.failure}")
        return self._engine

    @contextlib.contextmanager
    def place(self, count: int = 1) -> Iterator[None]:
        """``count`` places in the queue while the ``with`` lasts. Raises ApiError: 429 if they are taken, 400 if there
        are not as many."""
        if count > self._max_queue:
            raise invalid("n", f"this server decodes at most {self._max_queue} sequences for a request, not {count}")
        if self._places + count > self._max_queue:
            raise ApiError(429, f"{self._places} requests wait already; try again later", code="rate_limit_exceeded")
        self._places += count
        try:
            yield
        finally:
            self._places -= count
            if self._is_closing and not self._places:
                self._on_idle()

    async def tokenizing(self, call: Callable[[], T]) -> T:
        """The result of ``call``, on the thread that tokenizes."""
        return await asyncio.get_running_loop().run_in_executor(self._submitting, call)

    @contextlib.asynccontextmanager
    async def decoding(self, engine: Engine, asked: ApiRequest) -> AsyncIterator[list[Served]]:
        """The answers to ``asked``; what is left of them is cancelled at the end of the ``with``. Raises ApiError where
        it cannot be served."""
        if asked.messages is not None:
            await self.warmed()
        submitted = self._submitting.submit(submit, engine, asked)
        try:
            answers = await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            submitted.add_done_callback(_give_up)
            raise
        self.served.update(answers)
        try:
            if self._is_cancelling:
                _cancel(answers)
            yield answers
        finally:
            _cancel(answers)
            for served in answers:
                self.served.discard(served)
                self.metrics.finish(served)


def _cancel(answers: list[Served]) -> None:
    for served in answers:
        served.handle.cancel()  # where it has ended nothing happens


def _give_up(submitted: Future[list[Served]]) -> None:
    """Cancel what was submitted for a client that has gone meanwhile."""
    if not submitted.cancelled() and submitted.exception() is None:
        _cancel(submitted.result())


def is_greedy(engine: Engine, asked: ApiRequest) -> bool:
    """Whether all choices for a prompt have the same tokens, or none."""
    return asked.max_new_tokens == 0 or not asked.sampling.get("temperature", engine.sampling.temperature)


def sequences(engine: Engine, asked: ApiRequest) -> int:
    """How many sequences the engine decodes for ``asked``."""
    return max(1, len(asked.prompts)) * (1 if is_greedy(engine, asked) else asked.n)


def submit(engine: Engine, asked: ApiRequest) -> list[Served]:
    """Have ``engine`` decode ``asked``. Raises ApiError where it cannot."""
    answers: list[Served] = []
    greedy = is_greedy(engine, asked)
    try:
        prompts = _tokenized(engine, asked)
        settings = _settings(engine, asked)
        for index, (tokens, limit) in enumerate(prompts):
            first = index * asked.n
            for choices in _choices(first, asked.n, greedy):
                prompt = _echoed(engine, asked, index) if asked.echo else None
                served = Served(choices, prompt, asked.priority)
                seed = asked.sampling.get("seed", engine.sampling.seed if greedy else secrets.randbits(64))
                sampling = replace(engine.sampling, **settings, seed=(seed + choices.start - first) % SEEDS)
                more: dict[str, Any] = {"sampling": sampling, "stop": asked.stop, "priority": asked.priority}
                served.handle = engine.submit(tokens, limit, asked.ignore_eos, watch=served.watch, **more)
                answers.append(served)
    except BaseException as error:
        _cancel(answers)
        if isinstance(error, JobOver):
            raise ApiError(503, str(error)) from None
        if isinstance(error, UserError):  # all else has been looked at
            raise invalid("stop", str(error)) from None
        raise
    return answers


def _choices(first: int, n: int, is_greedy: bool) -> list[range]:
    """The choices of one prompt, by the sequences that they come from."""
    return [range(first, first + n)] if is_greedy else [range(first + i, first + i + 1) for i in range(n)]


def _tokenized(engine: Engine, asked: ApiRequest) -> list[tuple[list[int], int]]:
    """The tokens of each prompt, and how many new ones there are to be."""
    param = "prompt" if asked.messages is None else "messages"
    found = []
    try:
        for prompt in asked.prompts if asked.messages is None else [chat_tokens(engine, asked.messages)]:
            tokens = engine.tokenize(prompt, 0 if asked.max_new_tokens == 0 else 1)
            room = engine.context - len(tokens)
            default = min(room, COMPLETION_TOKENS) if asked.messages is None else room
            limit = default if asked.max_new_tokens is None else asked.max_new_tokens
            found.append((engine.tokenize(tokens, limit), limit))
    except ContextExceeded as error:
        raise invalid(param, str(error), "context_length_exceeded") from None
    except UserError as error:
        raise invalid(param, str(error)) from None
    return found


def chat_tokens(engine: Engine, messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation. Raises ApiError (422) for one that the chat template does not take."""
    try:
        return engine.tokenize_chat(messages)
    except UserError as error:
        raise ApiError(422, str(error), "messages") from None


def _settings(engine: Engine, asked: ApiRequest) -> dict[str, Any]:
    """The sampling settings of all sequences, without the seed."""
    settings = {name: value for name, value in asked.sampling.items() if name != "seed"}
    if asked.logprobs:
        settings["top_logprobs"] = asked.logprobs
    if asked.scores_prompt:
        settings["prompt_logprobs"] = asked.logprobs
    grammar, field = asked.grammar
    if grammar:
        try:
            engine.check_grammar(grammar)
        except UserError as error:
            raise invalid(field, f"{field}: {error}") from None
        settings["grammar"] = grammar
    for token, _ in settings.get("logit_bias", ()):
        try:
            engine.tokenize([token], 1)
        except UserError:
            raise invalid("logit_bias", f"logit_bias: token {token} is not in the vocabulary") from None
    return settings


def _echoed(engine: Engine, asked: ApiRequest, index: int) -> str:
    prompt = asked.prompts[index]
    return prompt if isinstance(prompt, str) else engine.decode(prompt)
