"""Requests of one engine, side by side: nobody gets another one's tokens, whoever asks from wherever."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from launch.mpiexec import command
from pipeinfer import Engine
from pipeinfer.core.errors import UserError
from pipeinfer.engine.answer import Completion
from pipeinfer.engine.engine import MAX_NUM_SEQS
from stages.models.kernel_shard import KernelShard
from stages.models.llama import LlamaShard
from tests.faults.matrix import ROOT

pytestmark = pytest.mark.slow
PROMPTS = ("def read_lines(path):\n", "import os\n", "class Node:\n")
COUNT = 32
HANG_S = 300.0


@pytest.fixture(scope="module", params=[1, 2])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(ranks=request.param, policy="continuous") as opened:
        assert opened is not None
        yield opened


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[str, list[int]]:
    return {prompt: engine.generate(prompt, COUNT, ignore_eos=True).tokens for prompt in PROMPTS}


def test_streams_side_by_side_are_those_that_are_alone(engine: Engine, alone: dict[str, list[int]]) -> None:
    streams = {prompt: engine.stream(prompt, COUNT, ignore_eos=True) for prompt in PROMPTS}
    found: dict[str, list[int]] = {}
    while streams:
        for prompt in list(streams):
            piece = next(streams[prompt])
            if isinstance(piece, Completion):
                found[prompt] = piece.tokens
                del streams[prompt]
    assert found == alone


def test_a_stream_that_is_held_or_closed_hinders_nobody(engine: Engine, alone: dict[str, list[int]]) -> None:
    held, closed = (engine.stream(prompt, COUNT, ignore_eos=True) for prompt in PROMPTS[:2])
    next(held)
    next(closed)
    closed.close()
    assert engine.generate(PROMPTS[2], COUNT, ignore_eos=True).tokens == alone[PROMPTS[2]]
    *_, completion = held
    assert isinstance(completion, Completion)
    assert completion.tokens == alone[PROMPTS[0]]


def test_threads_and_asyncio(engine: Engine, alone: dict[str, list[int]]) -> None:
    found: dict[str, list[int]] = {}

    def ask(prompt: str) -> None:
        found[prompt] = engine.generate(prompt, COUNT, ignore_eos=True).tokens

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in PROMPTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_S)
    assert found == alone

    async def main() -> list[Completion]:
        return list(await asyncio.gather(*(whole(prompt) for prompt in PROMPTS)))

    async def whole(prompt: str) -> Completion:
        return await engine.submit(prompt, COUNT, ignore_eos=True)

    assert [answer.tokens for answer in asyncio.run(main())] == list(alone.values())


def test_ids_in_any_form_and_those_that_there_are_not(engine: Engine) -> None:
    ids = engine.tokenize(PROMPTS[0], COUNT)
    answers = [engine.generate(form, 8, ignore_eos=True) for form in (ids, np.array(ids), torch.tensor([ids]))]
    assert answers[0].tokens == answers[1].tokens == answers[2].tokens
    for wrong in ([5, 99999], [-1], b"bytes", [0.5]):
        with pytest.raises(UserError):
            engine.generate(wrong, 8)
    assert engine.generate(ids, 8, ignore_eos=True).tokens == answers[0].tokens


def test_a_cancelled_request_says_so(engine: Engine) -> None:
    handles = [engine.submit(PROMPTS[0], 900, ignore_eos=True) for _ in range(MAX_NUM_SEQS + 1)]
    next(iter(handles[0]))
    for handle in reversed(handles):  # or the last one would be given the place of another
        handle.cancel()
    assert {handle.result().finish_reason for handle in handles} == {"cancelled"}
    assert not handles[-1].completion.tokens, "it waits for a place"


def test_the_program_s_collector_is_left_alone(engine: Engine) -> None:
    assert gc.isenabled()
    assert not gc.get_freeze_count()


def test_decoding_alone_leaves_no_model_behind(engine: Engine, alone: dict[str, list[int]]) -> None:
    def models() -> int:
        gc.collect()
        return sum(type(thing) in (KernelShard, LlamaShard) for thing in gc.get_objects())

    before = models()
    assert engine.decode_alone(engine.tokenize(PROMPTS[1], COUNT), COUNT, ignore_eos=True) == alone[PROMPTS[1]]
    assert models() == before


@pytest.mark.parametrize(("code", "ends"), [("0", 0), ("3", 3)])
def test_a_program_that_leaves_inside_the_engine(code: str, ends: int) -> None:
    program = f"from pipeinfer import Engine\nwith Engine() as engine:\n    engine and exit({code})\n"
    line, environ = command(2, [sys.executable, "-c", program])
    environ["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == ends, done.stderr
    assert done.stderr.count("pipeinfer: ") == (ends != 0)
    assert "Traceback" not in done.stderr
