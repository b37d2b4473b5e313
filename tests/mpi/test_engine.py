"""The Python interface on ranks it started itself: several requests, abandoned streams, errors that leave nothing
behind."""

from __future__ import annotations

import pytest

from pipeinfer import Engine
from pipeinfer.engine import Completion
from pipeinfer.errors import UserError

pytestmark = pytest.mark.slow

PROMPT = "def read_lines(path):\n"


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_stream_is_its_completion_and_may_be_left_early(ranks: int) -> None:
    with Engine(ranks=ranks, timeout_s=20.0) as engine:
        assert engine is not None
        *pieces, completion = engine.stream(PROMPT, 24, ignore_eos=True)
        assert isinstance(completion, Completion)
        assert "".join(str(piece) for piece in pieces) == completion.text
        for count, _ in enumerate(engine.stream(PROMPT, 900, ignore_eos=True)):
            if count == 3:
                break  # the rest is withdrawn, and the engine is free for the next request
        again = engine.generate(PROMPT, 24, ignore_eos=True)
        assert again.tokens == completion.tokens == engine.decode_alone(completion.prompt_tokens, 24, ignore_eos=True)
        if ranks == 1:
            short = engine.stream(PROMPT, 1, ignore_eos=True)
            next(short)
            short.close()  # its end had come together with its only token
        with pytest.raises(UserError, match="context of 1024"):
            engine.generate(PROMPT, 2000)
        assert engine.generate(completion.prompt_tokens, 24, ignore_eos=True).tokens == completion.tokens


def test_an_error_in_the_caller_s_program_ends_the_ranks() -> None:
    def program() -> None:
        with Engine(ranks=2) as engine:
            assert engine is not None
            for _ in engine.stream(PROMPT, 50):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        program()
