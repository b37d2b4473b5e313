"""How many prompt tokens a run holds: few where stages wait to be filled, many where a pass of few is no shorter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from pipeinfer.core.messages import Result
from pipeinfer.orchestrator.launcher import Launcher
from speculation.schedules.cost_curve import Costs
from speculation.schedules.policy import CONTINUOUS
from speculation.schedules.prefill_chunks import SMALLEST, PrefillChunks
from speculation.schedules.schedule import PLACEMENTS, Placement
from tests.unit.test_launcher import Pad

MOST = 128
POLICY = replace(CONTINUOUS, prefill_chunk=MOST)


def linear(fixed_s: float, row_s: float) -> Callable[[int], float]:
    return lambda rows: fixed_s + row_s * rows


def prior(pass_s: Callable[[int], float]) -> Costs:
    return tuple((rows, pass_s(rows)) for rows in (1, 2, 4, 8, 16))


def chunks(stages: int, known: Costs = (), placement: Placement = "spread") -> PrefillChunks:
    return PrefillChunks(POLICY, stages, placement, known)


def first_token_s(rows: int, prompt: int, stages: int, pass_s: Callable[[int], float]) -> float:
    return (-(-prompt // rows) + stages - 1) * pass_s(rows)


@pytest.mark.parametrize("stages", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("prompt", [17, 128, 513, 4096])
@pytest.mark.parametrize(("fixed_s", "row_s"), [(0.013, 0.007), (0.02, 0.0002), (0.0, 0.001), (0.03, 0.0)])
def test_no_other_chunk_brings_the_first_token_earlier(
    stages: int, prompt: int, fixed_s: float, row_s: float
) -> None:
    pass_s = linear(fixed_s, row_s)
    rows = chunks(stages, prior(pass_s)).rows(prompt, is_decoding=False)
    assert rows <= MOST
    others = [first_token_s(other, prompt, stages, pass_s) for other in range(MOST // SMALLEST, MOST + 1)]
    assert first_token_s(rows, prompt, stages, pass_s) <= min(others) * (1 + 1e-9)


def test_where_rows_are_free_a_chunk_is_as_long_as_it_may_be() -> None:
    assert chunks(4, prior(linear(0.03, 0.0))).rows(4 * MOST, is_decoding=False) == MOST


def test_one_stage_has_nothing_to_fill() -> None:
    assert chunks(1, prior(linear(0.0, 0.01))).rows(1000, is_decoding=False) == MOST


@pytest.mark.parametrize("placement", sorted(set(PLACEMENTS) - {"spread"}))
def test_stages_that_share_cores_are_like_one(placement: Placement) -> None:
    assert chunks(4, prior(linear(0.0, 0.01)), placement).rows(1000, is_decoding=False) == MOST


def test_a_policy_may_fix_the_chunk() -> None:
    found = PrefillChunks(replace(POLICY, fit_chunks=False), 4, prior=prior(linear(0.0, 0.01)))
    assert found.rows(1000, is_decoding=False) == MOST
    assert not found.depend_on_costs


def test_chunks_of_a_prompt_are_equally_long() -> None:
    rows = chunks(2, prior(linear(0.02, 0.0001))).rows(MOST + 2, is_decoding=False)
    assert rows == MOST // 2 + 1


def test_while_others_decode_fewer_runs_are_better_as_a_run_of_theirs_follows_each() -> None:
    found = chunks(4, prior(linear(0.01, 0.005)))
    alone = found.rows(512, is_decoding=False)
    found.decoded(0.1)
    assert found.rows(512, is_decoding=True) > alone == found.rows(512, is_decoding=False)


def test_without_pass_times_the_first_runs_tell() -> None:
    found, pass_s = chunks(4), linear(0.001, 0.005)
    sizes = list[int]()
    for _ in range(8):
        sizes.append(found.rows(MOST, is_decoding=False))
        found.prefilled(sizes[-1], pass_s(sizes[-1]))
    assert sizes[0] == MOST
    assert first_token_s(sizes[-1], MOST, 4, pass_s) < 0.7 * first_token_s(MOST, MOST, 4, pass_s), sizes


def test_the_launcher_cuts_prompts_so_and_learns_from_runs_that_were_computed() -> None:
    pad = Pad(64, slots=(99, 8), prefill_chunk=32)
    heard = list[tuple[int, float]]()

    class Listening(PrefillChunks):
        def prefilled(self, rows: int, slowest_s: float) -> None:
            heard.append((rows, slowest_s))

    listening = Listening(replace(POLICY, prefill_chunk=32), 4, prior=prior(linear(0.0, 0.01)))
    pad.launcher = Launcher(pad.allocator, pad.flight, listening)
    pad.prompted()
    assert [len(run.prompts[1]) for run in pad.flight] == [4] * 16
    first, second, third = list(pad.flight)[:3]
    second.cancelled_at = 0.0
    pad.launcher.returned(first, Result(first.number, False, 5000, 3000))
    pad.launcher.returned(second, Result(second.number, False, 5000, 3000))
    pad.launcher.returned(third, Result(third.number, True, 0, 0))
    assert heard == [(4, 0.003)]
