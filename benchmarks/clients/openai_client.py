"""The openai package against a server: completions, chats, streams and errors. Run by a Python that has the package.

python benchmarks/clients/openai_client.py URL [--model M] [--api-key KEY]

One line per check; the exit code is 1 if one failed. The server must have a chat template (see chat_pair.py).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import traceback
from collections.abc import Callable
from typing import Any

import openai

PROMPT = "def read_lines(path):\n"
CHAT: Any = [{"role": "user", "content": "Count from 1 to 5."}]
TOKENS = 24
WHOLE = {"ignore_eos": True}  # newlines end an answer of the pair for chats


class Checks:
    """What is checked, with one client and one ``model``."""

    def __init__(self, url: str, model: str, api_key: str) -> None:
        self.url, self.model, self.api_key = url, model, api_key
        self.client = openai.OpenAI(base_url=url, api_key=api_key, max_retries=0)

    def models(self) -> None:
        assert self.model in [model.id for model in self.client.models.list()]
        assert self.client.models.retrieve(self.model).id == self.model

    def completion(self) -> None:
        answer = self.completed()
        assert answer.object == "text_completion" and answer.choices[0].text
        usage = answer.usage
        assert usage and usage.completion_tokens <= TOKENS
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert self.completed().choices[0].text == answer.choices[0].text

    def completion_of_several_prompts(self) -> None:
        answer = self.completed(prompt=[PROMPT, "import os\n"])
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.choices[0].text == self.completed().choices[0].text

    def completion_sampled(self) -> None:
        answers = [self.completed(n=3, temperature=0.8, top_p=0.9, seed=7) for _ in range(2)]
        texts = [[choice.text for choice in answer.choices] for answer in answers]
        assert texts[0] == texts[1] and len(set(texts[0])) > 1, texts

    def completion_log_probabilities(self) -> None:
        told = self.completed(logprobs=2).choices[0].logprobs
        assert told and told.tokens and told.token_logprobs and told.top_logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs)

    def completion_stop(self) -> None:
        choice = self.completed(stop=["line"]).choices[0]
        assert choice.finish_reason == "stop" and "line" not in choice.text

    def completion_stream(self) -> None:
        stream = self.client.completions.create(
            model=self.model,
            prompt=PROMPT,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=WHOLE,
        )
        *chunks, last = stream
        text = "".join(chunk.choices[0].text for chunk in chunks)
        assert text == self.completed().choices[0].text
        assert not last.choices and last.usage and last.usage.completion_tokens

    def completion_many_at_once(self) -> None:
        async def ask() -> list[str]:
            async with openai.AsyncOpenAI(base_url=self.url, api_key=self.api_key, max_retries=0) as client:
                create = client.completions.create
                given: Any = {"model": self.model, "prompt": PROMPT, "max_tokens": TOKENS, "extra_body": WHOLE}
                asked = [create(**given, temperature=0) for _ in range(16)]
                return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

        assert set(asyncio.run(ask())) == {self.completed().choices[0].text}

    def chat(self) -> None:
        answer = self.chatted()
        message = answer.choices[0].message
        assert message.role == "assistant" and message.content and answer.choices[0].finish_reason in ("stop", "length")

    def chat_parts_and_log_probabilities(self) -> None:
        parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
        choice = self.chatted(messages=parts, logprobs=True, top_logprobs=2).choices[0]
        assert choice.message.content == self.chatted().choices[0].message.content
        assert choice.logprobs and choice.logprobs.content
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)

    def chat_stream(self) -> None:
        stream = self.client.chat.completions.create(
            model=self.model, messages=CHAT, max_tokens=TOKENS, temperature=0, stream=True
        )
        chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == self.chatted().choices[0].message.content
        assert chunks[-1].choices[0].finish_reason

    def chat_stream_helper(self) -> None:
        with self.client.chat.completions.stream(
            model=self.model, messages=CHAT, max_tokens=TOKENS, temperature=0
        ) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        assert {"chunk", "content.delta", "content.done"} <= kinds
        assert final.choices[0].message.content == self.chatted().choices[0].message.content

    def stream_left_early(self) -> None:
        given: Any = {"model": self.model, "prompt": PROMPT, "max_tokens": 400, "extra_body": WHOLE}
        with self.client.completions.create(**given, stream=True) as stream:
            next(iter(stream))
        assert self.completed().choices[0].text

    def errors(self) -> None:
        wrong: list[tuple[type[openai.APIStatusError], dict[str, Any], str | None]] = [
            (openai.NotFoundError, {"model": "another"}, "model"),
            (openai.BadRequestError, {"max_tokens": 0}, "max_tokens"),
            (openai.BadRequestError, {"max_tokens": 10**6}, "prompt"),
            (openai.BadRequestError, {"temperature": -1}, "temperature"),
            (openai.BadRequestError, {"extra_body": {"unheard_of": 1}}, "unheard_of"),
        ]
        for kind, more, param in wrong:
            error = refusal(lambda more=more: self.completed(**more))
            assert isinstance(error, kind) and error.param == param and error.message, error

    def error_of_a_tool(self) -> None:
        tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        error = refusal(lambda: self.chatted(tools=[tool]))
        assert isinstance(error, openai.BadRequestError) and error.param == "tools", error

    def wrong_key(self) -> None:
        with openai.OpenAI(base_url=self.url, api_key="wrong", max_retries=0) as client:
            error = refusal(client.models.list)
        assert isinstance(error, openai.AuthenticationError) and error.code == "invalid_api_key", error

    def completed(self, **more: Any) -> Any:
        given = {"model": self.model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "extra_body": WHOLE}
        return self.client.completions.create(**given | more)

    def chatted(self, **more: Any) -> Any:
        given = {"model": self.model, "messages": CHAT, "max_tokens": TOKENS, "temperature": 0}
        return self.client.chat.completions.create(**given | more)

    def all(self) -> list[Callable[[], None]]:
        return [
            *([] if self.api_key == "none" else [self.wrong_key]),
            self.models, self.completion, self.completion_of_several_prompts, self.completion_sampled,
            self.completion_log_probabilities, self.completion_stop, self.completion_stream,
            self.completion_many_at_once, self.chat, self.chat_parts_and_log_probabilities, self.chat_stream,
            self.chat_stream_helper, self.stream_left_early, self.errors, self.error_of_a_tool,
        ]  # fmt: skip


def refusal(call: Callable[[], Any]) -> openai.APIStatusError | None:
    """What refuses ``call``, if anything does."""
    try:
        call()
    except openai.APIStatusError as error:
        return error
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="Check a server by the openai package.")
    parser.add_argument("url", help="http://HOST:PORT")
    parser.add_argument("--model", default="builtin")
    parser.add_argument(
        "--api-key", default="none", help="the server's key, if it wants one; a wrong one is tried, too"
    )
    args = parser.parse_args()
    checks, failed = Checks(f"{args.url}/v1", args.model, args.api_key).all(), 0
    for check in checks:
        try:
            check()
            print("passed", check.__name__)
        except Exception:
            failed += 1
            print("failed", check.__name__)
            traceback.print_exc()
    print(f"openai {openai.__version__}: {len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
