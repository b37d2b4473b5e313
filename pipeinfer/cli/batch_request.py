"""A line of a batch with the engine: submitted by the rules of `pipeinfer serve`, and answered in its words."""

from __future__ import annotations

import contextlib
from typing import Any

from pipeinfer.cli.batch_lines import Line
from pipeinfer.core.errors import PipeinferError
from pipeinfer.engine.answer import Completion
from pipeinfer.engine.engine import Engine
from pipeinfer.serve.fields import DEFAULT_MODEL, parse
from pipeinfer.serve.front import submit
from pipeinfer.serve.replies import ChatReply, Reply, TextReply, TokenTexts


class BatchRequest:
    """The request in ``line``, which ``engine`` decodes from now on; ``model``: its name. Raises ApiError for what
    cannot be served."""

    def __init__(self, engine: Engine, line: Line, model: str) -> None:
        if line.error is not None:
            raise line.error
        asked = parse(line.body, line.is_chat, (model, DEFAULT_MODEL))
        self.line = line
        self._handle = submit(engine, asked)
        previous = self._handle.completion.prompt_tokens[-1]
        texts = TokenTexts(engine.decode, previous) if asked.with_logprobs else None
        kind: Any = ChatReply if line.is_chat else TextReply
        self._reply: Reply = kind(model, texts, False)

    @property
    def completions(self) -> list[Completion]:
        """What is decoded for the request."""
        return [self._handle.completion]

    @property
    def is_over(self) -> bool:
        """Whether everything has ended."""
        return all(completion.finish_reason for completion in self.completions)

    async def wait(self) -> None:
        """Wait until everything has ended, in whatever way."""
        with contextlib.suppress(PipeinferError):  # the completion has it
            await self._handle

    def drive(self) -> None:
        """As wait, where the engine is driven by who waits."""
        with contextlib.suppress(PipeinferError):
            self._handle.result()

    def cancel(self) -> None:
        """No more is wanted."""
        self._handle.cancel()

    def body(self) -> dict[str, Any]:
        """The response object."""
        return self._reply.whole(self._handle.completion)
