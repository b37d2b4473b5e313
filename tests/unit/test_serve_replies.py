"""What is in the server's answers: choices, usage, log-probabilities, repeated prompts, speculation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from launch.requests import RequestOutput
from pipeinfer.core.messages import TopToken
from pipeinfer.core.ports import GREEDY, RequestStats
from pipeinfer.engine.answer import Completion
from pipeinfer.serve.fields import ApiRequest
from pipeinfer.serve.replies import ChatReply, TextReply
from pipeinfer.serve.served import Served
from tests.unit.scripted_engine import Scripted, asked, chunks, completed, counted, is_watched, served, told

HELLO = [{"role": "user", "content": "hello"}]
needs_watching = pytest.mark.skipif(not is_watched(), reason="this engine tells an awaited handle no statistics")


def test_greedy_choices_are_decoded_once() -> None:
    engine = Scripted(is_brief=True)
    with served(engine) as server:
        answer = completed(server, prompt="xyz", n=3)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "ab"), (1, "ab"), (2, "ab")]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert len(engine.settings) == 1


def test_drawn_choices_have_seeds_of_their_own() -> None:
    engine = Scripted(is_brief=True)
    with served(engine, max_queue=6) as server:
        answer = completed(server, prompt=["x", "yz"], n=3, temperature=1, seed=2**64 - 1)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert [settings.seed for settings in engine.settings] == [2**64 - 1, 0, 1] * 2
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_more_choices_than_places_are_refused() -> None:
    with served(Scripted(), max_queue=2) as server:
        status, body = told(asked(server, "/v1/completions", {"prompt": "x", "n": 3, "temperature": 1}))
        assert (status, body["error"]["param"]) == (400, "n")


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_of_several_choices(chat: bool) -> None:
    body: dict[str, Any] = {"messages": HELLO} if chat else {"prompt": "hello"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    with served(Scripted(is_brief=True), max_queue=2) as server:
        found = [chunk["choices"][0] for chunk in chunks(server, path, **body, n=2, temperature=1)]
    for index in (0, 1):
        mine = [choice for choice in found if choice["index"] == index]
        assert "".join(c["delta"].get("content", "") if chat else c["text"] for c in mine) == "ab"
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + ["length"]


@pytest.mark.parametrize("prompt", ["xyz", [120, 121, 122]])
def test_a_prompt_is_repeated(prompt: Any) -> None:
    with served(Scripted(is_brief=True)) as server:
        assert completed(server, prompt=prompt, echo=True)["choices"][0]["text"] == "xyzab"
        texts = [chunk["choices"][0]["text"] for chunk in chunks(server, prompt=prompt, echo=True)]
    assert texts == ["xyz", "a", "b", ""]


SCORED: dict[str, Any] = {
    "tokens": ["x", "y", "z", "a", "b"],
    "token_logprobs": [None, -121 / 8, -122 / 8, -0.5, -1.5],
    "top_logprobs": None,
    "text_offset": [0, 1, 2, 3, 4],
}
"""What is told of the prompt ``xyz`` and the answer ``ab``."""


@pytest.mark.parametrize("prompt", ["xyz", [120, 121, 122]])
def test_a_prompt_is_repeated_with_its_log_probabilities(prompt: Any) -> None:
    engine = Scripted(is_brief=True)
    with served(engine) as server:
        answer = completed(server, prompt=prompt, echo=True, logprobs=0, n=2)
        found = [chunk["choices"][0] for chunk in chunks(server, prompt=prompt, echo=True, logprobs=0)]
    assert [(one["text"], one["logprobs"]) for one in answer["choices"]] == [("xyzab", SCORED)] * 2
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert len(engine.settings) == 2, "the choices of the first request are one sequence"
    assert [choice["text"] for choice in found] == ["xyza", "b", ""]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [each for choice in found for each in choice["logprobs"][name]] == SCORED[name]


def test_a_prompt_is_scored_and_nothing_else() -> None:
    with served(Scripted(), max_queue=2) as server:
        body = {"prompt": ["xyz", "uv"], "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 1.0}
        answer = completed(server, **body)
        found = [chunk["choices"][0] for chunk in chunks(server, **body | {"prompt": "xyz"})]
        assert [one["text"] for one in completed(server, **body | {"prompt": "x", "n": 2})["choices"]] == ["x"] * 2
    first, second = answer["choices"]
    assert (first["text"], first["finish_reason"], second["text"]) == ("xyz", "length", "uv")
    assert first["logprobs"] == {
        "tokens": ["x", "y", "z"],
        "token_logprobs": [None, -121 / 8, -122 / 8],
        "top_logprobs": [None, {"y": -121 / 8, "b": -0.25}, {"z": -122 / 8, "b": -0.25}],
        "text_offset": [0, 1, 2],
    }
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}
    assert [(choice["text"], choice["logprobs"]) for choice in found] == [("xyz", first["logprobs"])]


def test_usage_at_the_end_and_all_along() -> None:
    options = {"include_usage": True}
    with served(Scripted(is_brief=True)) as server:
        *found, last = chunks(server, prompt="xyz", stream_options=options)
        assert [chunk["usage"] for chunk in found] == [None] * len(found)
        *every, same = chunks(server, prompt="xyz", stream_options=options | {"continuous_usage_stats": True})
    assert last["usage"] == same["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert last["choices"] == []
    counts = [chunk["usage"]["completion_tokens"] for chunk in every]
    assert counts == sorted(counts) and counts[-1] == 2


def test_settings_reach_the_engine() -> None:
    engine = Scripted(is_brief=True)
    with served(engine) as server:
        completed(server, prompt="x", priority=-4, min_p=0.25, repetition_penalty=1.5, top_k=7)
    (settings,) = engine.settings
    assert (settings.min_p, settings.repetition_penalty, settings.top_k) == (0.25, 1.5, 7)
    assert engine.priorities == [-4]


def test_a_conversation_that_the_template_does_not_take() -> None:
    with served(Scripted()) as server:
        body = {"messages": [{"role": "assistant", "content": "x"}]}
        status, answer = told(asked(server, "/v1/chat/completions", body))
        assert (status, answer["error"]["param"]) == (422, "messages")


class Whole:
    """A handle whose answer is over."""

    def __init__(self, completion: Completion) -> None:
        self.completion = completion


TOPS = [(TopToken(97, -0.5), TopToken(99, -1.0)), (TopToken(100, -0.25), TopToken(98, -2.0))]


def watched(stats: RequestStats | None = None) -> Served:
    """The answer ``ab``, and what the engine has told of it."""
    found = Served(range(1))
    completion = Completion("ab", [120], [97, 98], "stop", logprobs=[-0.5, float("-inf")], top_logprobs=list(TOPS))
    found.handle = Whole(completion)  # type: ignore[assignment]
    for at_s in (0.0, 1.0):
        found.watch(RequestOutput(at_s, (97,), load=(3, 1, 0.25)))
    if stats is not None:
        found.watch(RequestOutput(2.0, stats=stats))
    return found


def test_log_probabilities_of_alternatives() -> None:
    request = ApiRequest(["x"], logprobs=2)
    answer = TextReply("mine", [watched()], request, Scripted().decode).whole()
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{"a": -0.5, "c": -1.0}, {"b": -2.0, "d": -0.25}],
        "text_offset": [0, 1],
    }
    answer = ChatReply("mine", [watched()], request, Scripted().decode).whole()
    first = answer["choices"][0]["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("a", -0.5, [97])
    assert [(top["token"], top["logprob"]) for top in first["top_logprobs"]] == [("a", -0.5), ("c", -1.0)]
    json.dumps(answer, allow_nan=False)


def test_tokens_wait_for_their_alternatives() -> None:
    """The engine's thread adds a token before what belongs to it."""
    answer = watched()
    del answer.completion.top_logprobs[1:]
    reply = TextReply("mine", [answer], ApiRequest(["x"], logprobs=2), Scripted().decode)
    (chunk,) = reply.chunks(answer, "a")
    assert chunk["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.5, "c": -1.0}]
    answer.completion.top_logprobs.append(TOPS[1])
    (chunk,) = reply.chunks(answer, "b")
    assert chunk["choices"][0]["logprobs"]["tokens"] == ["b"]
    assert chunk["choices"][0]["logprobs"]["text_offset"] == [1]


def test_what_speculation_did() -> None:
    """Twelve tokens: the prompt's successor, and three steps that each end with a correction."""
    block = watched(counted(16, 8, 4, [0, 0, 1, 2])).speculation()
    assert block is not None
    block.pop("acceptance_histogram", None)
    assert block == {
        "mean_acceptance_length": 1 + 8 / 3,
        "draft_acceptance_rate": 0.5,
        "num_spec_steps": 3,
        "num_accepted_draft_tokens": 8,
        "num_draft_tokens": 16,
    }
    assert watched(RequestStats(corrections=4)).speculation() is None
    assert watched().speculation() is None


@dataclass(slots=True)
class Counted(RequestStats):
    """Statistics of an engine that counts steps by their accepted tokens."""

    acceptance_histogram: list[int] = field(default_factory=list)


@pytest.mark.parametrize(
    ("accepted", "told", "histogram"),
    [(7, [1, 0, 2], [1, 0, 2, 1]), (4, [1, 0, 2], [1, 0, 2]), (5, [1, 0, 2], [1, 1, 2]), (2, [], [0, 0, 1])],
)
def test_the_end_of_an_answer_ends_a_step(accepted: int, told: list[int], histogram: list[int]) -> None:
    block = watched(Counted(drafted=9, accepted=accepted, acceptance_histogram=told)).speculation()
    assert block is not None
    assert (block["acceptance_histogram"], block["num_spec_steps"]) == (histogram, sum(histogram))
    assert block["mean_acceptance_length"] == 1 + accepted / sum(histogram)


def test_what_is_watched() -> None:
    found = watched(RequestStats(drafted=1))
    assert (found.gaps_s, found.runs_in_flight, found.kv_usage) == ([1.0], 3, 0.25)
    assert found.stats == RequestStats(drafted=1)


@needs_watching
def test_speculation_is_told_where_there_is_one_choice() -> None:
    with served(Scripted(is_brief=True)) as server:
        block = completed(server, prompt="x")["metrics"]["speculative_decoding"]
        assert (block["num_draft_tokens"], block["num_accepted_draft_tokens"]) == (4, 1)
        *_, last = chunks(server, prompt="x", stream_options={"include_usage": True})
        assert last["metrics"]["speculative_decoding"] == block
        assert completed(server, prompt="x", n=2)["metrics"] is None


def test_greedy_is_what_the_model_says_if_nobody_says_more() -> None:
    class Warm(Scripted):
        sampling = GREEDY.__class__(temperature=1.0)

    engine = Warm(is_brief=True)
    with served(engine) as server:
        completed(server, prompt="x", n=2)
        assert len(engine.settings) == 2
        completed(server, prompt="x", n=2, temperature=0)
        assert len(engine.settings) == 3
