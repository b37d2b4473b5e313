"""The endpoints /tokenize and /detokenize, with vLLM's fields."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pipeinfer.core.errors import UserError
from pipeinfer.engine.engine import Engine
from pipeinfer.engine.request_builder import ContextExceeded
from pipeinfer.serve.access import check_key
from pipeinfer.serve.bodies import as_json, read_body
from pipeinfer.serve.checks import flag, read_object, refuse_others, shown
from pipeinfer.serve.errors import invalid
from pipeinfer.serve.fields import DEFAULT_MODEL, check_model
from pipeinfer.serve.front import Front, chat_tokens
from pipeinfer.serve.prompts import messages, token_list
from pipeinfer.serve.replies import TokenTexts
from pipeinfer.text import Numbers, Text

_NEUTRAL: dict[str, tuple[object, ...]] = {"add_special_tokens": (True,)}
_NEUTRAL_CHAT: dict[str, tuple[object, ...]] = {
    "add_special_tokens": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "tools": ([],),
}


class Tokenizing:
    """The two endpoints. ``api_key``: what clients must send, or None."""

    def __init__(self, front: Front, api_key: str | None) -> None:
        self._front, self._api_key = front, api_key
        self._text: Text | None = None

    async def tokenize(self, request: Request) -> Response:
        """The tokens of a prompt, or of a conversation under the chat template."""
        engine, fields = await self._read(request)
        is_chat = fields.get("messages") is not None
        own = "messages" if is_chat else "prompt"
        refuse_others(fields, {"model", "return_token_strs", own}, _NEUTRAL_CHAT if is_chat else _NEUTRAL)
        with_texts = flag(fields, "return_token_strs")
        if is_chat:
            call = partial(chat_tokens, engine, messages(fields["messages"]))
        else:
            call = partial(self._encode, engine, _prompt(fields.get("prompt")))
        with self._front.place():
            await self._front.warmed()
            tokens = await self._front.tokenizing(call)
            texts = await self._front.tokenizing(partial(_texts, engine, tokens)) if with_texts else None
        told = {"count": len(tokens), "max_model_len": engine.context, "tokens": tokens, "token_strs": texts}
        return as_json(told)

    async def detokenize(self, request: Request) -> Response:
        """The text of tokens."""
        engine, fields = await self._read(request)
        refuse_others(fields, {"model", "tokens"}, {})
        tokens = token_list(fields.get("tokens"), "tokens")
        with self._front.place():
            return as_json({"prompt": await self._front.tokenizing(partial(_decode, engine, tokens))})

    async def _read(self, request: Request) -> tuple[Engine, dict[str, Any]]:
        check_key(request, self._api_key)
        engine = self._front.engine()
        fields = read_object(await read_body(request))
        check_model(fields, (self._front.model, DEFAULT_MODEL))
        return engine, fields

    def _encode(self, engine: Engine, prompt: str) -> list[int]:
        """The tokens of ``prompt``, which may be longer than the context."""
        if self._text is None:
            kind = Numbers if engine.config.forced_acceptance else Text
            self._text = kind(engine.config.tokenizer_directory)
        try:
            return self._text.encode(prompt)
        except UserError as error:
            raise invalid("prompt", str(error)) from None


def _prompt(value: object) -> str:
    if not isinstance(value, str):
        raise invalid("prompt", f"prompt must be a text, not {shown(value)}")
    return value


def _texts(engine: Engine, tokens: list[int]) -> list[str]:
    texts = TokenTexts(engine.decode, tokens[0]) if tokens else None
    return [] if texts is None else [engine.decode(tokens[:1]), *map(texts.next, tokens[1:])]


def _decode(engine: Engine, tokens: list[int]) -> str:
    try:
        if tokens:
            engine.tokenize(tokens, 1)  # it knows the vocabulary
    except ContextExceeded:
        pass
    except UserError as error:
        raise invalid("tokens", str(error)) from None
    return engine.decode(tokens)
