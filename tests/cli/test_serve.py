"""`pipeinfer serve` as its clients see it: a process with ranks of its own, asked over HTTP."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pipeinfer.core.config import BUILTIN, model_directory
from tests.cli.run import here
from tests.cli.serving import HANG_S, KEY, PROMPT, Client, events, serving

pytestmark = pytest.mark.slow
TEMPLATE = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The built-in pair with a chat template."""
    target = tmp_path_factory.mktemp("models") / "chatty"
    target.mkdir()
    for path in model_directory(BUILTIN, "target").iterdir():
        (target / path.name).symlink_to(path)
    config = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").unlink()
    (target / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    draft = str(model_directory(BUILTIN, "draft"))
    with serving("--target", str(target), "--draft", draft, "--grace", str(HANG_S)) as client:
        yield client


def test_answers_are_those_of_run(server: Client) -> None:
    arguments = ["--prompt", PROMPT, "--max-new-tokens", "40", "--ignore-eos", "--json", "--logprobs"]
    run = json.loads(here("run", *arguments).stdout)
    answer = server.complete(max_tokens=40, logprobs=0)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (run["text"], "length")
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(run["logprobs"], abs=1e-3)
    assert "".join(choice["logprobs"]["tokens"]) == run["text"]
    length = len(run["prompt_tokens"])
    assert answer["usage"] == {"prompt_tokens": length, "completion_tokens": 40, "total_tokens": length + 40}
    assert (answer["object"], answer["model"]) == ("text_completion", "chatty")
    assert server.text(prompt=run["prompt_tokens"], max_tokens=40) == run["text"]
    assert server.complete()["usage"]["completion_tokens"] == 16


def test_a_stream_adds_up_to_the_whole(server: Client) -> None:
    whole = server.complete(max_tokens=60, logprobs=0)
    body = {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True, "logprobs": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    with server.open("/v1/completions", body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, last = events(response)
    choices = [chunk["choices"][0] for chunk in chunks]
    (expected,) = whole["choices"]
    assert len(chunks) > 5 and {chunk["id"] for chunk in chunks} == {last["id"]}
    assert "".join(choice["text"] for choice in choices) == expected["text"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(chunks) - 1) + ["length"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [each for choice in choices for each in choice["logprobs"][name]] == expected["logprobs"][name]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks)


def test_a_chat(server: Client) -> None:
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_completion_tokens": 24, "ignore_eos": True}
    status, answer = server.ask("/v1/chat/completions", body | {"logprobs": True, "model": "default"})
    assert status == 200, answer
    (choice,) = answer["choices"]
    said = choice["message"]["content"]
    assert (answer["object"], choice["message"]["role"], choice["finish_reason"]) == (
        "chat.completion", "assistant", "length",
    )  # fmt: skip
    assert said == server.text(prompt=f"# user\n{PROMPT}", max_tokens=24)
    content = choice["logprobs"]["content"]
    assert len(content) == 24 and bytes(content[0]["bytes"]).decode() == content[0]["token"]
    with server.open("/v1/chat/completions", body | {"stream": True}) as response:
        first, *middle, last = (chunk["choices"][0] for chunk in events(response))
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"]["content"] for choice in middle) == said
    assert (last["delta"], last["finish_reason"]) == ({}, "length")


def test_seeds_repeat_and_stop_strings_stop(server: Client) -> None:
    drawn = [server.text(max_tokens=24, temperature=0.9, seed=seed) for seed in (7, 7, 8)]
    assert drawn[0] == drawn[1] != drawn[2]
    whole = server.text(max_tokens=40)
    word = whole[20:24]
    (choice,) = server.complete(max_tokens=40, stop=["never said", word])["choices"]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(word)], "stop")


def test_alternatives_biases_and_penalties(server: Client) -> None:
    (choice,) = server.complete(max_tokens=8, logprobs=3)["choices"]
    told = choice["logprobs"]
    for token, logprob, top in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert 1 <= len(top) <= 3 and top[token] == logprob == max(top.values())
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    with server.open("/v1/chat/completions", body | {"stream": True}) as response:
        found = [chunk["choices"][0]["logprobs"] for chunk in events(response)]
    alternatives = [token["top_logprobs"] for each in found if each for token in each["content"]]
    assert [len(top) for top in alternatives] == [2] * len(alternatives) != []
    (token,) = server.ask("/tokenize", {"prompt": " pass"})[1]["tokens"]
    assert server.text(max_tokens=4, logit_bias={str(token): 100}) == " pass" * 4
    plain = server.text(max_tokens=48)
    assert server.text(max_tokens=48, frequency_penalty=2, presence_penalty=2) != plain
    status, answer = server.ask("/v1/completions", {"prompt": "x", "logit_bias": {"99999999": 1}})
    assert (status, answer["error"]["param"]) == (400, "logit_bias")


def test_texts_are_scored_as_evaluation_harnesses_do(server: Client) -> None:
    """lm-eval's loglikelihood: prompts are token ids of a context and a continuation, one token is generated and left
    out, and a continuation is greedy where each of its tokens is the most probable one."""
    context = server.ask("/tokenize", {"prompt": PROMPT})[1]["tokens"]
    (plain,) = server.complete(prompt=context, max_tokens=6, logprobs=1)["choices"]
    tails = [server.ask("/tokenize", {"prompt": text})[1]["tokens"] for text in (plain["text"], "    pass\n", " = 3")]
    texts = [context + tail for tail in tails]
    body = {"prompt": texts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    found = []
    for choice, tail in zip(server.complete(**body)["choices"], tails, strict=True):
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        assert "".join(told["tokens"]) == choice["text"]
        first, last = len(context), len(context) + len(tail)
        assert [len(told[name]) for name in told] == [last + 1] * 4
        tokens, logprobs, tops = (told[name][first:last] for name in ("tokens", "token_logprobs", "top_logprobs"))
        is_greedy = all(max(top, key=top.get) == token for token, top in zip(tokens, tops, strict=True))
        found.append((sum(logprobs), is_greedy))
    if tails[0] == server.ask("/tokenize", {"prompt": PROMPT + plain["text"]})[1]["tokens"][len(context) :]:
        assert found[0] == (sum(plain["logprobs"]["token_logprobs"]), True), "what decoding says, bit by bit"
    assert [is_greedy for _, is_greedy in found[1:]] == [False, False]
    assert found[0][0] > max(score for score, _ in found[1:])
    only = server.complete(**body | {"max_tokens": 0, "n": 2, "temperature": 1.0})
    assert only["usage"] == {"prompt_tokens": sum(map(len, texts)), "completion_tokens": 0,
                             "total_tokens": sum(map(len, texts))}  # fmt: skip
    whole = server.complete(**body | {"prompt": texts[0]})["choices"][0]["logprobs"]
    for index, choice in enumerate(only["choices"]):
        assert choice["finish_reason"] == "length"
        if index < 2:
            assert choice["logprobs"]["token_logprobs"] == whole["token_logprobs"][:-1]
    with server.open("/v1/completions", body | {"prompt": texts[0], "stream": True, "ignore_eos": True}) as response:
        streamed = [chunk["choices"][0]["logprobs"] for chunk in events(response)]
    assert {name: [each for one in streamed for each in one[name]] for name in whole} == whole
    for wrong in ({"echo": False}, {"logprobs": None}):
        status, answer = server.ask("/v1/completions", body | {"max_tokens": 0} | wrong)
        assert (status, answer["error"]["param"]) == (400, "max_tokens")


def test_answers_that_follow_a_grammar(server: Client) -> None:
    pytest.importorskip("llguidance", reason="the package llguidance is not installed")
    schema = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"]}
    schema |= {"additionalProperties": False}
    by_schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 200, "response_format": by_schema}
    status, answer = server.ask("/v1/chat/completions", body)
    (choice,) = answer["choices"]
    assert (status, choice["finish_reason"]) == (200, "stop")
    assert json.loads(choice["message"]["content"]) in ({"n": 1}, {"n": 22})
    with server.open("/v1/chat/completions", body | {"stream": True}) as response:
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in events(response)]
    assert "".join(pieces) == choice["message"]["content"]
    for fields, wanted in (({"guided_json": json.dumps(schema)}, "{"), ({"guided_regex": "x(yz){3}"}, "xyzyzyz")):
        answers = server.complete(max_tokens=200, ignore_eos=False, n=2, temperature=1.0, seed=4, **fields)["choices"]
        assert all(each["text"].startswith(wanted) and each["finish_reason"] == "stop" for each in answers)
    for fields in ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
                   {"guided_json": {"uniqueItems": True}}, {"guided_regex": "(x"}):  # fmt: skip
        status, answer = server.ask("/v1/completions", {"prompt": "x", **fields})
        assert (status, answer["error"]["param"]) == (400, next(iter(fields)))


def test_choices_and_prompts_are_those_of_single_requests(server: Client) -> None:
    more = {"max_tokens": 16, "temperature": 0.9}
    alone = [server.text(seed=seed, **more) for seed in (7, 8)]
    answer = server.complete(n=2, seed=7, **more)
    assert [choice["text"] for choice in answer["choices"]] == alone
    prompts = [PROMPT, "import os\n"]
    texts = [server.text(prompt=prompt, max_tokens=16) for prompt in prompts]
    answer = server.complete(prompt=prompts, n=2, echo=True, max_tokens=16)
    said = [prompt + text for prompt, text in zip(prompts, texts, strict=True) for _ in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == said
    assert answer["usage"]["completion_tokens"] == 64


def test_tokens_and_texts(server: Client) -> None:
    status, answer = server.ask("/tokenize", {"prompt": PROMPT, "return_token_strs": True})
    assert (status, "".join(answer["token_strs"])) == (200, PROMPT)
    assert server.complete(max_tokens=4)["usage"]["prompt_tokens"] == answer["count"]
    assert server.ask("/detokenize", {"tokens": answer["tokens"]}) == (200, {"prompt": PROMPT})
    chat = {"messages": [{"role": "user", "content": PROMPT}]}
    same = server.ask("/tokenize", {"prompt": f"# user\n{PROMPT}"})[1]["tokens"]
    assert server.ask("/tokenize", chat)[1]["tokens"] == same


def test_requests_are_counted(server: Client) -> None:
    def count(name: str) -> float:
        with server.open("/metrics", key=None) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f'vllm:{name}{{model_name="chatty"'))

    before = count("generation_tokens_total"), count("e2e_request_latency_seconds_count")
    server.complete(max_tokens=24)
    assert count("generation_tokens_total") - before[0] == 24
    assert count("e2e_request_latency_seconds_count") - before[1] == 1
    assert count("num_requests_running") == count("num_requests_waiting") == 0


def test_who_may_ask_and_what_exists(server: Client) -> None:
    assert server.ask("/health", key=None)[0] == 200
    for key in (None, "guess"):
        for path, body in (("/v1/models", None), ("/v1/completions", {"prompt": "x"})):
            status, answer = server.ask(path, body, key)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
    assert [model["id"] for model in server.ask("/v1/models")[1]["data"]] == ["chatty"]
    assert [server.ask(f"/v1/models/{name}")[0] for name in ("chatty", "default", "other")] == [200, 200, 404]
    status, answer = server.ask("/v1/completions", {"prompt": "x", "model": "other"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"{", None, None),
        ({"prompt": "x", "n": 200}, "n", None),
        ({"prompt": "x", "best_of": 2}, "best_of", None),
        ({"prompt": "x", "response_format": {"type": "xml"}}, "response_format", None),
        ({"prompt": ""}, "prompt", None),
        ({"prompt": [99999]}, "prompt", None),
        ({"prompt": "\ud800"}, "prompt", None),
        ({"prompt": "x", "stop": ["a<|endoftext|>"]}, "stop", None),
        ({"prompt": "x", "max_tokens": 5000}, "prompt", "context_length_exceeded"),
        ({"prompt": "word " * 2000, "stream": True}, "prompt", "context_length_exceeded"),
    ],
    ids=str,
)
def test_what_cannot_be_served(server: Client, body: Any, param: str | None, code: str | None) -> None:
    status, answer = server.ask("/v1/completions", body)
    assert status == 400
    error = answer["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


def test_a_client_that_leaves_holds_up_nobody(server: Client) -> None:
    for stream in (True, False):
        response = None
        body = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "stream": stream}
        if stream:
            response = server.open("/v1/completions", body)
            next(events(response))
            response.close()
        else:
            with socket.create_connection(server.address.split(":"), HANG_S) as wire:  # type: ignore[arg-type]
                data = json.dumps(body)
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
                wire.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode())
        assert server.complete(max_tokens=4)["usage"]["completion_tokens"] == 4


def test_two_at_once_are_both_answered(server: Client) -> None:
    prompts = (PROMPT, "import os\n")
    alone = [server.text(prompt=prompt, max_tokens=24) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda prompt: server.text(prompt=prompt, max_tokens=24), prompts))
    assert together == alone


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "starlette", None)
    done = here("serve")
    assert done.returncode == 2
    assert done.stderr == "pipeinfer: `pipeinfer serve` needs starlette; pip install 'pipeinfer[serve]'\n"


def test_options_that_cannot_be() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, says in [
            (["--port", port], "cannot listen there"),
            (["--port", "70000"], "--port 70000"),
            (["--max-queue", "0"], "--max-queue 0"),
            (["--grace", "-1"], "--grace -1"),
            (["--api-key", ""], "API key"),
            (["--served-model-name", ""], "--served-model-name"),
            (["--timeout", "-1"], "--timeout -1"),
            (["--draft", "somewhere"], "--draft without --target"),
        ]:
            done = here("serve", *arguments)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert says in done.stderr
