"""The endpoints that decode: whole answers, streams, and what happens where the client goes away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from pipeinfer.core.errors import PipeinferError
from pipeinfer.serve.access import check_key
from pipeinfer.serve.bodies import EVENT_STREAM, as_json, encoded, event, read_body
from pipeinfer.serve.errors import ApiError
from pipeinfer.serve.fields import DEFAULT_MODEL, ApiRequest, parse
from pipeinfer.serve.front import Front, sequences
from pipeinfer.serve.replies import ChatReply, Reply, TextReply
from pipeinfer.serve.served import Served


class Decoding:
    """The ASGI application of an endpoint that decodes."""

    def __init__(self, front: Front, api_key: str | None, is_chat: bool) -> None:
        self._front, self._api_key, self._is_chat = front, api_key, is_chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request. Raises ApiError before the response begins."""
        request = Request(scope, receive)
        check_key(request, self._api_key)
        self._front.engine()
        try:
            data = await read_body(request)
            asked = parse(data, self._is_chat, (self._front.model, DEFAULT_MODEL))
            with self._front.place(sequences(self._front.engine(), asked)):
                await unless_gone(receive, self._answer(asked, scope, receive, send))
        except ClientDisconnect:
            pass  # nobody hears an answer

    async def _answer(self, asked: ApiRequest, scope: Scope, receive: Receive, send: Send) -> None:
        engine = self._front.engine()
        async with self._front.decoding(engine, asked) as answers:
            kind = ChatReply if self._is_chat else TextReply
            reply = kind(self._front.model, answers, asked, engine.decode)
            if asked.stream:
                await _send_stream(_events(answers, reply), send)
            else:
                await _wait(answers)
                # The texts of many tokens take long, so that other answers would wait.
                whole = await self._front.tokenizing(reply.whole) if asked.scores_prompt else reply.whole()
                await as_json(whole)(scope, receive, send)


async def _wait(answers: list[Served]) -> None:
    """Wait until all ``answers`` are whole. Raises ApiError for one that failed."""
    try:
        async with contextlib.aclosing(_pieces(answers)) as pieces:
            async for _ in pieces:
                pass
    except PipeinferError as error:
        raise ApiError(500, str(error)) from None


async def _events(answers: list[Served], reply: Reply) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a stream; an error is the last of them."""
    try:
        for chunk in reply.opening():
            yield chunk
        async with contextlib.aclosing(_pieces(answers)) as pieces:
            async for served, piece in pieces:
                reason = None if piece is not None else served.completion.finish_reason
                for chunk in reply.chunks(served, piece or "", reason):
                    yield chunk
        for chunk in reply.closing():
            yield chunk
    except ApiError as error:
        yield error.body()
    except PipeinferError as error:
        yield ApiError(500, str(error)).body()


async def _pieces(answers: list[Served]) -> AsyncGenerator[tuple[Served, str | None], None]:
    """The pieces of all ``answers`` in the order in which they come; None ends an answer."""
    found: asyncio.Queue[tuple[Served, str | None, Exception | None]] = asyncio.Queue(len(answers))

    async def take(served: Served) -> None:
        try:
            async for piece in served.handle:
                served.take(piece)
                await found.put((served, piece, None))
            _refuse_cancelled(served)
        except Exception as error:
            await found.put((served, None, error))
        else:
            await found.put((served, None, None))

    takers = [asyncio.ensure_future(take(served)) for served in answers]
    try:
        left = len(answers)
        while left:
            served, piece, error = await found.get()
            if error is not None:
                raise error
            left -= piece is None
            yield served, piece
    finally:
        for taker in takers:
            taker.cancel()
        await asyncio.gather(*takers, return_exceptions=True)


def _refuse_cancelled(served: Served) -> None:
    """Raise ApiError where the answer was cancelled though its client is there."""
    if served.completion.finish_reason == "cancelled":
        raise ApiError(503, "the server is shutting down")


async def _send_stream(chunks: AsyncGenerator[dict[str, Any], None], send: Send) -> None:
    """Send ``chunks`` as server-sent events."""
    await send({"type": "http.response.start", "status": 200, "headers": EVENT_STREAM})
    async with contextlib.aclosing(chunks):
        async for chunk in chunks:
            await send({"type": "http.response.body", "body": event(encoded(chunk)), "more_body": True})
    await send({"type": "http.response.body", "body": event(b"[DONE]")})


async def unless_gone(receive: Receive, answering: Coroutine[Any, Any, None]) -> None:
    """Do ``answering``. If the client goes away before its end, cancel it and raise ClientDisconnect."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.ensure_future(answering), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
        is_answered = answer.done()
    finally:
        answer.cancel()
        leaving.cancel()
        await asyncio.gather(answer, leaving, return_exceptions=True)
    if not is_answered:
        raise ClientDisconnect
    answer.result()
