"""The Python interface on ranks it started itself: several requests, abandoned streams, errors that leave nothing
behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeinfer import Engine, Sampling
from pipeinfer.core.errors import UserError
from pipeinfer.engine.answer import Completion

pytestmark = pytest.mark.slow

PROMPT = "def read_lines(path):\n"


@pytest.fixture(scope="module", params=[1, 3], ids=["one rank", "three ranks"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """One for all tests here: whatever a request was, and however it was left, the next one is served."""
    with Engine(ranks=request.param, timeout_s=300.0) as engine:
        assert engine is not None
        yield engine


def test_a_stream_is_its_completion_and_may_be_left_early(engine: Engine) -> None:
    *pieces, completion = engine.stream(PROMPT, 24, ignore_eos=True)
    assert isinstance(completion, Completion)
    assert "".join(str(piece) for piece in pieces) == completion.text
    for count, _ in enumerate(engine.stream(PROMPT, 900, ignore_eos=True)):
        if count == 3:
            break  # the rest is aborted, and the engine is free for the next request
    again = engine.generate(PROMPT, 24, ignore_eos=True)
    assert again.tokens == completion.tokens == engine.decode_alone(completion.prompt_tokens, 24, ignore_eos=True)
    short = engine.stream(PROMPT, 1, ignore_eos=True)
    next(short)
    short.close()  # its end had come together with its only token
    with pytest.raises(UserError, match="context of 1024"):
        engine.generate(PROMPT, 2000)
    assert engine.generate(completion.prompt_tokens, 24, ignore_eos=True).tokens == completion.tokens


def test_a_stop_string_ends_the_answer(engine: Engine) -> None:
    whole = engine.generate(PROMPT, 48, ignore_eos=True)
    word = whole.text[20:24]
    place = whole.text.index(word)
    *pieces, stopped = engine.stream(PROMPT, 900, ignore_eos=True, stop=["never said", word])
    assert isinstance(stopped, Completion)
    assert (stopped.text, stopped.finish_reason) == (whole.text[:place], "stop")
    assert "".join(str(piece) for piece in pieces) == stopped.text
    count = len(stopped.tokens)
    assert stopped.tokens == whole.tokens[:count] == engine.decode_alone(
        stopped.prompt_tokens, 900, ignore_eos=True, stop=word
    )  # fmt: skip
    assert len(stopped.logprobs) == count
    assert stopped.metrics["runs"] > 0 and stopped.metrics["ttft_ms"] > 0
    assert stopped.config["stop"] == ["never said", word]
    for piece in engine.stream(PROMPT, 900, ignore_eos=True, stop=word):
        if len(str(piece)) > 0:
            break  # a stream with a stop string may be left early as well
    with pytest.raises(UserError, match="empty stop string"):
        engine.generate(PROMPT, 4, stop=["x", ""])
    assert engine.generate(PROMPT, 48, ignore_eos=True).tokens == whole.tokens


def test_what_is_sampled_depends_on_the_seed_alone(engine: Engine) -> None:
    answers = set()
    for seed in (1, 2**64 - 1):
        sampling = Sampling(0.8, 50, 0.95, 0.01, 1.1, seed)
        answer = engine.generate(PROMPT, 32, ignore_eos=True, sampling=sampling)
        assert engine.generate(PROMPT, 32, ignore_eos=True, sampling=sampling).tokens == answer.tokens
        alone = engine.decode_alone(answer.prompt_tokens, 32, ignore_eos=True, sampling=sampling)
        assert alone == answer.tokens
        assert answer.config["sampling"]["seed"] == seed
        assert all(logp < 0 for logp in answer.logprobs)
        assert len(answer.logprobs) == 32
        answers.add(tuple(answer.tokens))
    assert len(answers) == 2


def test_an_error_in_the_caller_s_program_ends_the_ranks() -> None:
    def program() -> None:
        with Engine(ranks=2) as engine:
            assert engine is not None
            for _ in engine.stream(PROMPT, 50):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        program()
