"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import pytest

from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.text import Text
from tests.unit.scripted_engine import Scripted, asked, served, told

TEXT = "def read_lines(path):\n"


def test_a_prompt_has_the_tokenizers_tokens_however_long() -> None:
    text = Text(model_directory(BUILTIN, "target"))
    with served(Scripted()) as server:
        for prompt in (TEXT, TEXT * 50, ""):
            body = {"prompt": prompt, "model": "default", "add_special_tokens": True}
            answer = told(asked(server, "/tokenize", body))
            tokens = text.encode(prompt)
            assert answer == (200, {"count": len(tokens), "max_model_len": 100, "tokens": tokens, "token_strs": None})


def test_a_conversation_has_those_of_the_template() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True, "return_token_strs": True}
    with served(Scripted()) as server:
        status, answer = told(asked(server, "/tokenize", body))
    assert (status, answer["tokens"], answer["token_strs"]) == (200, [104, 105], ["h", "i"])


def test_tokens_have_a_text() -> None:
    with served(Scripted()) as server:
        assert told(asked(server, "/detokenize", {"tokens": [104, 105]})) == (200, {"prompt": "hi"})
        assert told(asked(server, "/detokenize", {"tokens": []})) == (200, {"prompt": ""})


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": False}, 400, "add_special_tokens"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "unheard_of": 1}, 400, "unheard_of"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "assistant", "content": "x"}]}, 422, "messages"),
        ("/tokenize", b"{", 400, None),
        ("/detokenize", {"tokens": "x"}, 400, "tokens"),
        ("/detokenize", {"tokens": [1.5]}, 400, "tokens"),
        ("/detokenize", {"tokens": [999]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
def test_what_is_refused(path: str, body: Any, status: int, param: str | None) -> None:
    with served(Scripted()) as server:
        found, answer = told(asked(server, path, body))
        assert (found, answer["error"]["param"]) == (status, param)


def test_the_key_is_needed_here_too() -> None:
    with served(Scripted(), api_key="secret") as server:
        for path in ("/tokenize", "/detokenize"):
            assert told(asked(server, path, {"prompt": "x"}))[0] == 401
        assert asked(server, "/metrics").status == 200
