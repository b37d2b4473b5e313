"""A handle: pieces as they come, the whole, giving up, in plain code and in asyncio; and what an early end leaves."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pytest

from launch.requests import OnOutput, RequestOutput
from pipeinfer.core.errors import NotFiniteError, StallError
from pipeinfer.core.messages import TopToken
from pipeinfer.core.ports import Request, RequestStats, Sampling
from pipeinfer.engine.answer import Completion, Handle

REQUEST = Request((1, 2), 10)
RANKS = [
    {"rank": 0, "host": "one", "layers": None},
    {"rank": 1, "host": "two", "layers": [0, 3]},
    {"rank": 2, "host": "three", "layers": [4, 7]},
]


class Scripted:
    """A job that tells what the test says."""

    is_threaded = True
    ranks = RANKS
    traffic = (0, 0)

    def __init__(self) -> None:
        self.deliver: OnOutput
        self.cancelled: list[int] = []

    def submit(self, request: Request, on_output: OnOutput) -> int:
        self.deliver = on_output
        on_output(RequestOutput(1.0, number=7))
        return 7

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def wait(self, changed: threading.Condition, ready: Callable[[], bool], timeout_s: float | None = None) -> bool:
        return changed.wait_for(ready, timeout_s)

    def close(self) -> None: ...

    def kill(self) -> None: ...


class Letters:
    """A reader for which a token is a letter, and Z stops."""

    def __init__(self) -> None:
        self.shown = ""
        self.is_stopped = False

    def read(self, tokens: Sequence[int]) -> tuple[int, str]:
        text = "".join(map(chr, tokens))
        if "!" in text:
            raise ValueError("no such letter")
        self.is_stopped = "Z" in text
        piece = text.partition("Z")[0]
        self.shown += piece
        return len(piece) + self.is_stopped, piece

    def close(self) -> str:
        return ""


def output(text: str, at_s: float = 2.0, **more: Any) -> RequestOutput:
    return RequestOutput(at_s, tuple(map(ord, text)), logps=tuple(-1.0 for _ in text), number=7, **more)


def opened() -> tuple[Scripted, Handle]:
    job = Scripted()
    return job, Handle(job, REQUEST, Letters(), Completion())  # type: ignore[arg-type]


def test_log_probabilities_of_the_prompt() -> None:
    job, sampling = Scripted(), Sampling(prompt_logprobs=1)
    completion = Completion(prompt_tokens=[1, 2, 3])
    request = Request((1, 2, 3), 0, sampling=sampling)
    handle = Handle(job, request, Letters(), completion)  # type: ignore[arg-type]
    assert (completion.prompt_logprobs, completion.prompt_top_logprobs) == ([None], [()])
    tops = ((TopToken(5, -0.5),), (TopToken(3, -0.25),))
    job.deliver(RequestOutput(2.0, logps=(-1.0,), tops=tops[:1], number=7, is_of_prompt=True))
    job.deliver(RequestOutput(2.0, logps=(-0.25,), tops=tops[1:], number=7, is_of_prompt=True))
    job.deliver(RequestOutput(3.0, reason="length", stats=RequestStats(), number=7))
    assert handle.result() is completion
    assert (completion.prompt_logprobs, completion.prompt_top_logprobs) == ([None, -1.0, -0.25], [(), *tops])
    assert (completion.tokens, completion.logprobs, completion.finish_reason) == ([], [], "length")


def test_pieces_and_the_whole() -> None:
    job, handle = opened()
    job.deliver(output("ab"))
    job.deliver(output("c", 3.0))
    job.deliver(output("", 4.0, reason="length", stats=RequestStats()))
    assert list(handle) == ["ab", "c"]
    assert list(handle) == []
    answer = handle.result()
    assert (answer.text, answer.finish_reason, answer.error) == ("abc", "length", "")
    assert answer.metrics["ttft_ms"] == 1000.0
    assert answer.logprobs == [-1.0] * 3


def test_a_stop_string_cancels_the_rest_at_once() -> None:
    job, handle = opened()
    job.deliver(output("abZcd"))
    assert job.cancelled == [7]
    job.deliver(output("ef"))
    job.deliver(output("", reason="aborted", stats=RequestStats()))
    assert (handle.result().text, handle.result().finish_reason) == ("ab", "stop")
    assert len(handle.completion.tokens) == 3


def test_a_cancelled_answer_says_so() -> None:
    job, handle = opened()
    job.deliver(output("ab"))
    handle.cancel()
    job.deliver(output("", reason="aborted", stats=RequestStats()))
    assert job.cancelled == [7]
    assert (handle.result().text, handle.result().finish_reason) == ("ab", "cancelled")


@pytest.mark.parametrize(
    ("fault", "said"),
    [(2, "layer 2, on rank 1 (two)"), (7, "layer 7, on rank 2 (three)"), (8, "the output head, on rank 2")],
)
def test_numbers_that_are_not_finite_end_the_answer_and_name_the_place(fault: int, said: str) -> None:
    job, handle = opened()
    job.deliver(output("ab"))
    job.deliver(output("", reason="error", fault=fault, stats=RequestStats()))
    with pytest.raises(NotFiniteError) as raised:
        handle.result()
    assert said in str(raised.value)
    assert (handle.completion.text, handle.completion.finish_reason) == ("ab", "error")
    assert said in handle.completion.error
    assert json.loads(json.dumps(asdict(handle.completion), allow_nan=False))


def test_a_job_that_breaks_ends_the_answer_with_what_there_is() -> None:
    job, handle = opened()
    job.deliver(output("ab"))
    job.deliver(RequestOutput(3.0, number=7, reason="error", error=StallError("nothing moves")))
    pieces = iter(handle)
    assert next(pieces) == "ab"
    with pytest.raises(StallError):
        next(pieces)
    assert (handle.completion.text, handle.completion.error) == ("ab", "nothing moves")
    assert handle.completion.metrics["ttft_ms"] == 1000.0


def test_what_only_this_answer_cannot_read_ends_it_alone() -> None:
    job, handle = opened()
    job.deliver(output("a!"))
    assert job.cancelled == [7]
    with pytest.raises(ValueError, match="no such letter"):
        handle.result()
    job.deliver(output("", reason="aborted", stats=RequestStats()))  # late, and of no interest


def test_an_interrupted_answer_is_what_there_was() -> None:
    job, handle = opened()
    job.deliver(output("ab"))
    handle.interrupt(KeyboardInterrupt())
    job.deliver(output("cd"))
    assert (handle.completion.text, handle.completion.error) == ("ab", "KeyboardInterrupt")


def test_a_result_is_waited_for_as_long_as_asked() -> None:
    _, handle = opened()
    with pytest.raises(TimeoutError):
        handle.result(timeout_s=0.01)


def test_asyncio_takes_answers_side_by_side() -> None:
    async def main() -> list[Any]:
        opened_ones = [opened() for _ in range(3)]

        async def take(handle: Handle) -> list[str]:
            return [piece async for piece in handle]

        taking = [asyncio.ensure_future(take(handle)) for _, handle in opened_ones[:2]]
        whole = asyncio.ensure_future(_whole(opened_ones[2][1]))

        def deliver() -> None:
            for piece in "ab":
                for job, _ in opened_ones:
                    job.deliver(output(piece))
            for job, _ in opened_ones:
                job.deliver(output("", reason="length", stats=RequestStats()))

        await asyncio.to_thread(deliver)
        return [*await asyncio.gather(*taking), await whole]

    *pieces, whole = asyncio.run(asyncio.wait_for(main(), 300))
    assert pieces == [["a", "b"], ["a", "b"]]
    assert whole.text == "ab"


async def _whole(handle: Handle) -> Completion:
    return await handle
