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
from pipeinfer.serve.replies import ChatReply, TextReply


class BatchRequest:
    """The request in ``line``, which ``engine`` decodes from now on; ``model``: its name. Raises ApiError for what
    cannot be served."""

    def __init__(self, engine: Engine, line: Line, model: str) -> None:
        if line.error is not None:
            raise line.error
        asked = parse(line.body, line.is_chat, (model, DEFAULT_MODEL))
        self.line = line
        self._answers = submit(engine, asked)
        kind = ChatReply if line.is_chat else TextReply
        self._reply = kind(model, self._answers, asked, engine.decode)

    @property
    def completions(self) -> list[Completion]:
        """What is decoded for the request."""
        return [served.completion for served in self._answers]

    @property
    def is_over(self) -> bool:
        """Whether everything has ended."""
        return all(completion.finish_reason for completion in self.completions)

    async def wait(self) -> None:
        """Wait until everything has ended, in whatever way. Pieces are taken, so that ``served`` learns of them."""
        for served in self._answers:
            with contextlib.suppress(PipeinferError):  # the completion has it
                async for _ in served.handle:
                    pass

    def drive(self) -> None:
        """As wait, where the engine is driven by who waits."""
        for served in self._answers:
            with contextlib.suppress(PipeinferError):
                for _ in served.handle:
                    pass

    def cancel(self) -> None:
        """No more is wanted."""
        for served in self._answers:
            served.handle.cancel()

    def body(self) -> dict[str, Any]:
        """The response object."""
        return self._reply.whole()
