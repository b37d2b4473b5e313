"""Passes timed after loading, and kept for later jobs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.pass_cache import ENOUGH, PassCache, cache_directory
from launch.start_costs import agreed, measured
from pipeinfer.core.slots import batch_in_order
from pipeinfer.placement.roles import place
from pipeinfer.runtime.job_spec import JobSpec
from pipeinfer.runtime.pass_times import MOST_S, ROWS, pass_times, plausible, together
from pipeinfer.runtime.shards import load_shards
from speculation.schedules.policy import CONTINUOUS
from stages.models.emulated import EmulatedPair, EmulatedShard, EmulatedSpec, finish

SPEC = EmulatedSpec(layers=4)


def still() -> float:
    """A clock that stands: only what emulated layers rest counts."""
    return 0.0


def test_each_number_of_rows_has_its_time() -> None:
    shard = EmulatedShard(SPEC, range(4), 64, lambda rows, context: 0.25 * (1 + 0.1 * (rows - 1)))
    found = pass_times(shard, 64, choices=1, clock=still)
    assert found == [(rows, pytest.approx(1 + 0.1 * (rows - 1))) for rows in ROWS]


def test_slots_are_as_before() -> None:
    fresh, used = (EmulatedShard(SPEC, range(4), 40) for _ in range(2))
    pass_times(used, 40, choices=1)
    assert not used._kv.any()
    batch = batch_in_order([5, 6, 7])
    assert (finish(used.forward(batch, None)) == finish(fresh.forward(batch, None))).all()


@pytest.mark.parametrize("capacity", [1, 3, 15, 16, 17])
def test_few_slots_give_few_numbers_of_rows(capacity: int) -> None:
    shard = EmulatedShard(SPEC, range(4), capacity)
    assert [rows for rows, _ in pass_times(shard, capacity)] == [rows for rows in ROWS if rows <= capacity]


def test_a_later_stage_gets_activations() -> None:
    shard = EmulatedShard(SPEC, range(2, 4), 64, lambda rows, context: 1.0)
    found = pass_times(shard, 64, EmulatedPair(SPEC, lambda *_: 1.0, lambda *_: 1.0).blank, clock=still)
    assert found == [(rows, 2.0) for rows in ROWS]


def test_slow_passes_end_soon() -> None:
    now = 0.0

    class Slow(EmulatedShard):
        passes = 0

        def forward(self, batch: Any, hidden: Any) -> Generator[float, None, Any]:
            nonlocal now
            Slow.passes += 1
            now += 1.0
            return super().forward(batch, hidden)

    found = pass_times(Slow(SPEC, range(4), 64), 64, clock=lambda: now)
    assert Slow.passes <= MOST_S + 2
    assert found == [(1, 1.0), (16, 1.0)], "the extremes, which tell that rows are free here"


def test_a_pass_that_fails_tells_nothing_and_does_no_harm() -> None:
    class Broken(EmulatedShard):
        def forward(self, batch: Any, hidden: Any) -> Generator[float, None, Any]:
            if len(batch.tokens) == 4:
                raise RuntimeError("four rows fail")
            return super().forward(batch, hidden)

    shard = Broken(SPEC, range(4), 64)
    assert pass_times(shard, 64) == []
    assert not shard._kv.any()


def test_what_cannot_be_is_put_right() -> None:
    assert plausible([(1, 64.0), (2, 22.0), (4, 390.0), (8, 95.0), (16, 360.0)]) == [
        (1, 22.0), (2, 22.0), (4, 44.0), (8, 88.0), (16, 176.0),
    ]  # fmt: skip
    concave = [(1, 1.0), (2, 2.0), (4, 3.0), (8, 3.1)]
    assert plausible(concave) == concave
    assert plausible([]) == []


def test_the_slowest_stage_and_all_in_turn() -> None:
    ranks = [
        {"stages": [], "drafts": [[[1, 0.1], [2, 0.2]]]},
        {"stages": [[[1, 1.0], [2, 3.0], [4, 4.0]]], "drafts": []},
        {"stages": [[[1, 2.0], [2, 2.0]]], "drafts": [[[1, 0.3]], []]},
    ]
    assert together(ranks) == {
        "row_costs": [(1, 2.0), (2, 3.0)], "trip_costs": [(1, 3.0), (2, 5.0)], "draft_costs": [(1, 0.3)],
    }  # fmt: skip
    ranks[1]["stages"] = [[]]
    assert together(ranks)["row_costs"] == [], "a stage of which nothing is known"
    assert together([{"stages": [], "drafts": []}]) == {"row_costs": [], "trip_costs": [], "draft_costs": []}


def test_all_ranks_roles_are_measured_and_the_job_knows() -> None:
    pair = EmulatedPair(SPEC, lambda rows, context: 1.0, lambda rows, context: 0.4)
    job_spec = JobSpec(1, 1, CONTINUOUS, 64, placement="alone")
    (roles,) = place([range(4)], 1, True, True)
    shards = load_shards(job_spec, roles, pair)
    costs = agreed(measured(job_spec, roles, shards, pair, None), None)
    known = JobSpec.of(job_spec.numbers() | json.loads(json.dumps(costs)))
    assert dict(known.row_costs)[16] == pytest.approx(4.0, rel=0.2)
    assert dict(known.draft_costs)[1] == pytest.approx(0.4, rel=0.2)
    assert JobSpec.of(json.loads(json.dumps(known.numbers()))) == known


TIMES = [(1, 0.5), (2, 0.75)]


def test_the_cache_has_what_was_kept(tmp_path: Path) -> None:
    cache = PassCache({"threads": 2}, tmp_path)
    assert cache.read(layers=[0, 4]) == ([], 0)
    cache.write(TIMES, layers=[0, 4])
    assert PassCache({"threads": 2}, tmp_path).read(layers=[0, 4]) == (TIMES, 1)
    assert cache.read(layers=[0, 5]) == ([], 0)
    assert PassCache({"threads": 1}, tmp_path).read(layers=[0, 4]) == ([], 0)


def test_a_few_jobs_measure_and_the_least_time_stays(tmp_path: Path) -> None:
    cache, scales = PassCache({}, tmp_path), iter((3.0, 1.0, 2.0))
    found = [cache.times(lambda: [(1, next(scales))], drafter=1) for _ in range(ENOUGH + 2)]
    assert found == [[(1, 3.0)], [(1, 1.0)], [(1, 1.0)], [(1, 1.0)], [(1, 1.0)]]


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe", b"[]", b"{}", b"null", b'{"key": 1}', b"[" * 5000, b"x" * (1 << 17),
        {"passes": [[1, -1.0]]}, {"passes": [[1, math.inf]]}, {"passes": [[3, 1.0]]}, {"passes": [[2, 1.0], [1, 1.0]]},
        {"passes": "many"}, {"passes": [[1]]}, {"when": 0}, {"when": 1e18}, {"when": "now"}, {"jobs": "x"},
        {"key": {"format": 0}},
    ],
)  # fmt: skip
def test_a_damaged_foreign_or_old_file_counts_as_none(content: bytes | dict[str, Any], tmp_path: Path) -> None:
    cache = PassCache({}, tmp_path)
    cache.write(TIMES, layers=[0, 4])
    (path,) = tmp_path.iterdir()
    if isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    else:
        path.write_bytes(content)
    assert cache.read(layers=[0, 4]) == ([], 0)
    assert cache.times(lambda: TIMES, layers=[0, 4]) == TIMES
    assert cache.read(layers=[0, 4]) == (TIMES, 1)


def test_a_directory_that_cannot_be_had_fails_no_job(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = PassCache({}, tmp_path / "file" / "below")
    assert cache.times(lambda: TIMES, layers=[0, 4]) == TIMES


def test_where_the_cache_is() -> None:
    assert cache_directory({"PIPEINFER_CACHE": "off", "XDG_CACHE_HOME": "/a"}) is None
    assert cache_directory({"XDG_CACHE_HOME": "/a"}) == Path("/a/pipeinfer")
    assert cache_directory({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache" / "pipeinfer"
    assert os.environ["PIPEINFER_CACHE"] == "off", "tests measure for themselves"


def test_real_shards_are_as_before() -> None:
    torch = pytest.importorskip("torch")
    from launch.preflight import clear
    from pipeinfer.core.config import Config
    from stages.models.pair import CheckpointPair

    cleared = clear(Config(), 1)
    pair = CheckpointPair(cleared.target, [], "fp32", (0.5,))
    first, last = pair.stage(range(3), 64), pair.stage(range(3, 8), 64)
    assert len(pass_times(first, 64)) == len(pass_times(last, 64, pair.blank, 1)) == len(ROWS)
    for shard in (first, last._shard):  # type: ignore[attr-defined]
        assert not torch.count_nonzero(shard._all_kv if hasattr(shard, "_all_kv") else shard._kv)
    assert np.count_nonzero(last._speaker._kv) == 0  # type: ignore[attr-defined]


def test_other_threads_are_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import job
    from launch.preflight import clear
    from pipeinfer.core.config import Config

    monkeypatch.setenv("PIPEINFER_CACHE", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cleared = clear(Config(), 1)
    job._cache(cleared, None, 1).write([(1, 0.5)], ENOUGH, layers=[0, 8])
    assert job._cache(cleared, None, 1).read(layers=[0, 8]) == ([(1, 0.5)], ENOUGH)
    assert job._cache(cleared, None, 2).read(layers=[0, 8]) == ([], 0)
