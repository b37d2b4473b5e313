"""What is resident and what is streamed within a budget, and what preflight refuses before anything is loaded."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import pytest

from launch.preflight import clear
from pipeinfer.core.config import BUILTIN, Config, byte_count
from pipeinfer.core.errors import UserError
from stages.kernels.library import library
from stages.weights.plan import BUFFERS, Part, least_nbytes, make_plan, resident

LAYERS = [[Part(70, 72), Part(50, 52), Part(250, 256), Part(125, 128)] for _ in range(24)]
WHOLE = 24 * 495


def test_everything_is_resident_where_it_fits() -> None:
    plan = make_plan(LAYERS, 100, WHOLE + 100)
    assert plan == resident(LAYERS, 100)
    assert not plan.is_streaming and plan.nbytes == WHOLE + 100 and plan.stored(LAYERS) == 0


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 0.95])
def test_a_plan_uses_what_it_may(share: float) -> None:
    budget = int(share * WHOLE)
    plan = make_plan(LAYERS, 100, budget)
    assert plan is not None and plan.is_streaming
    assert plan.nbytes == budget
    streamed = [
        sum(part.nbytes for part, flag in zip(parts, flags, strict=True) if flag)
        for parts, flags in zip(LAYERS, plan.streamed, strict=True)
    ]
    assert plan.buffer_nbytes == max(streamed)
    assert plan.resident == WHOLE - sum(streamed)
    assert plan.read_nbytes >= max(
        part.stored
        for parts, flags in zip(LAYERS, plan.streamed, strict=True)
        for part, flag in zip(parts, flags, strict=True)
        if flag
    )
    halves = sum(streamed[:12]), sum(streamed[12:])
    assert max(halves) <= min(halves) + 495, "spread evenly"


def test_plans_of_random_layers_hold_their_budget_down_to_the_least() -> None:
    seed = random.randrange(1 << 32)
    dice = random.Random(seed)
    for _ in range(15):
        layers = [
            [Part(dice.randrange(1, 300), dice.randrange(1, 300)) for _ in range(dice.randrange(1, 5))]
            for _ in range(dice.randrange(1, 9))
        ]
        fixed = dice.randrange(200)
        least = least_nbytes(layers, fixed)
        assert make_plan(layers, fixed, least - 1) is None, f"seed {seed}"
        for budget in (least, least + dice.randrange(1000)):
            plan = make_plan(layers, fixed, budget)
            assert plan is not None and plan.nbytes <= budget, f"seed {seed}"
            total = plan.fixed + plan.resident + BUFFERS * plan.buffer_nbytes + plan.read_nbytes
            assert plan.nbytes == total, f"seed {seed}"
            assert plan.nbytes == budget or not plan.is_streaming, f"seed {seed}"


@pytest.mark.skipif(library() is None, reason="there is no library of kernels")
def test_preflight_says_the_least_memory_that_works() -> None:
    config = Config(BUILTIN, (), weights_memory=1 << 20)
    with pytest.raises(UserError, match=r"^--weights-memory 1048576 bytes are too few .* layers; give \d+M$") as error:
        clear(config, 1)
    least = byte_count(str(error.value).rsplit(" ", 1)[1], "")
    assert clear(replace(config, weights_memory=least), 1).config.weights_memory == least
    with pytest.raises(UserError):
        clear(replace(config, weights_memory=least - (1 << 20)), 1)
    assert clear(replace(config, weights_memory=least * 3 // 4), 4).plan, "ranks that share the layers need less"


def test_what_cannot_be_streamed_is_refused() -> None:
    config = Config(BUILTIN, (), weights_memory=1 << 30)
    with pytest.raises(UserError, match="without the library of decode kernels; leave it out"):
        clear(config, 1, has_kernels=False)
    forced = replace(config, random_weights=True, forced_acceptance=(0.5,))
    with pytest.raises(UserError, match="with --random-weights; leave one of them out"):
        clear(forced, 1, has_kernels=True)


def test_ranks_must_agree_on_it() -> None:
    config = Config(weights_memory=1 << 30)
    assert Config.of(asdict(config)) == config
    assert config.digest() != Config().digest()
