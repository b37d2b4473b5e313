"""A job whose head is this process: requests from any thread, in order, and what becomes of them when it breaks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from launch.head import LocalJob
from launch.job import Job
from launch.requests import JobOver, OnOutput, RequestOutput
from pipeinfer.core.config import Config
from pipeinfer.core.errors import UserError
from pipeinfer.core.ports import Batch, Request
from pipeinfer.placement.roles import assign
from speculation.schedules.policy import CONTINUOUS
from stages.models.emulated import EmulatedPair, EmulatedShard, EmulatedSpec, plain_tokens

SPEC = EmulatedSpec(layers=4, vocab=50, seed=9)
HANG_S = 300.0


class BreakingPair(EmulatedPair):
    """Its target fails in its tenth pass, once ``may_fail`` is set; trial passes after loading, of zeros, aside."""

    may_fail = threading.Event()

    def stage(self, layers: range, capacity: int) -> EmulatedShard:
        passes, may_fail = iter(range(10)), self.may_fail

        class Breaking(EmulatedShard):
            def forward(self, batch: Batch, hidden: Any) -> Generator[float, None, Any]:
                if batch.tokens.any() and next(passes, None) is None:
                    may_fail.wait(HANG_S)
                    raise RuntimeError("the tenth pass fails")
                return super().forward(batch, hidden)

        return Breaking(SPEC, layers, capacity)


@contextmanager
def opened(is_threaded: bool = True, pair: type[EmulatedPair] = EmulatedPair) -> Iterator[LocalJob]:
    no_time: Callable[[int, int], float] = lambda rows, context: 0.0  # noqa: E731
    config = Config(policy=CONTINUOUS.settings())
    job = LocalJob(Job(config, assign(1, SPEC.layers, 1), 200, pair(SPEC, no_time, no_time)), is_threaded)
    try:
        yield job
    finally:
        job.kill()


def request(seed: int, tokens: int = 20) -> Request:
    return Request((1, seed % 50, seed // 50), tokens)


def expected(asked: Request) -> list[int]:
    return plain_tokens(SPEC, asked.prompt, asked.max_new_tokens, asked.stop_tokens)


def tokens(told: list[RequestOutput]) -> list[int]:
    return [token for output in told for token in output.tokens]


@pytest.mark.parametrize("is_threaded", [True, False])
def test_requests_queue_in_order(is_threaded: bool) -> None:
    ended: list[int] = []
    with opened(is_threaded) as job:
        told: dict[int, list[RequestOutput]] = {}

        def on_output(output: RequestOutput) -> None:
            told.setdefault(output.number, []).append(output)
            if output.is_last:
                ended.append(output.number)

        asked = {job.submit(request(seed), on_output): request(seed) for seed in range(6)}
        last = job.decode(request(77))
        job.close()
    assert ended == list(asked)
    assert {number: tokens(outputs) for number, outputs in told.items()} == {
        n: expected(one) for n, one in asked.items()
    }
    assert tokens(last) == expected(request(77))
    with pytest.raises(JobOver):
        job.submit(request(1), print)


def test_any_thread_may_ask() -> None:
    found: dict[int, list[int]] = {}
    with opened() as job:

        def ask(seed: int) -> None:
            found[seed] = tokens(job.decode(request(seed)))

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
    assert found == {seed: expected(request(seed)) for seed in range(8)}


def test_without_a_thread_of_its_own_only_the_opener_s_may_wait() -> None:
    said: list[str] = []
    with opened(is_threaded=False) as job:

        def ask() -> None:
            with pytest.raises(UserError, match="one thread only") as refused:
                job.decode(request(1))
            said.append(str(refused.value))

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join(HANG_S)
        assert tokens(job.decode(request(2))) == expected(request(2))
    assert said


def test_a_cancelled_request_ends_and_the_next_is_served() -> None:
    with opened() as job:
        ends: dict[int, str] = {}

        def on_output(output: RequestOutput) -> None:
            if output.is_last:
                ends[output.number] = output.reason

        running, waiting = (job.submit(request(seed, 150), on_output) for seed in (1, 2))
        job.cancel(waiting)
        job.cancel(running)
        job.cancel(99)  # nobody's
        assert tokens(job.decode(request(3))) == expected(request(3))
        assert ends == {running: "aborted", waiting: "aborted"}


@pytest.mark.parametrize("is_threaded", [True, False])
def test_a_job_that_breaks_ends_its_requests_and_takes_no_more(
    is_threaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driving thread could reach the tenth pass before the second request was submitted, which then was refused."""
    may_fail, submit = threading.Event(), LocalJob.submit

    def submit_one(job: LocalJob, asked: Request, on_output: OnOutput) -> int:
        number = submit(job, asked, on_output)
        if number == 2:
            may_fail.set()
        return number

    monkeypatch.setattr(BreakingPair, "may_fail", may_fail)
    monkeypatch.setattr(LocalJob, "submit", submit_one)
    with opened(is_threaded, BreakingPair) as job:
        waiting: list[RequestOutput] = []
        job.submit(request(1, 150), waiting.append)
        assert job.failure is None
        with pytest.raises(RuntimeError, match="the tenth pass fails"):
            job.decode(request(2))
        assert isinstance(job.failure, RuntimeError)
        assert isinstance(waiting[-1].error, RuntimeError) and waiting[-1].reason == "error"
        assert tokens(waiting) == expected(request(1, 150))[: len(tokens(waiting))]
        with pytest.raises(JobOver, match="the job has ended"):
            job.submit(request(3), print)
