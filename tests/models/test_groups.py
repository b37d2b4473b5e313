"""Ranks that share a stage: the bits of one rank, commands in one order, and no wait without an end."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeinfer.core.errors import PipeinferError, StallError, UserError
from pipeinfer.core.ports import Sampling, SamplingInputs
from pipeinfer.core.slots import batch_in_order
from stages.kernels.group import RING, slot_nbytes
from stages.kernels.library import library
from stages.models.kernel_shard import KernelShard
from stages.models.path_trial import choose_path
from stages.models.split import Split, can_split, refuse_unsplittable
from tests.models.expert_bits import draw_expert_world
from tests.models.group_mutants import FAULTS, Planted, build
from tests.models.grouped import How, check_groups, endure, grouped, make_groups, run_pass
from tests.models.kernel_bits import World, draw_world, learn, load
from tests.models.kernel_mutants import COMPILER

SOUND = library()
pytestmark = pytest.mark.skipif(SOUND is None, reason="there is no library of kernels")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    assert SOUND is not None
    before = SOUND.threads, SOUND.isa
    yield
    SOUND.set_threads(before[0])
    SOUND.use(before[1])


def some_world(size: int, layers: int | None = None) -> World:
    """The first one that ``size`` ranks can split; with ``layers`` layers in one shard."""
    for seed in itertools.count():
        world = draw_world(seed, long_texts=False)
        if can_split(world.spec, size) and (layers is None or world.cuts == [range(layers)]):
            return world
    raise AssertionError


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_bits_are_those_of_one_rank(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused in one shot and in two, and in bulk; slots are full of what is not a number until they are written."""
    assert SOUND is not None
    if seed % 2:
        monkeypatch.setattr("stages.models.ends.MOST_ROWS", 1)  # the rows of a choice take an exchange each
    check_groups(seed, SOUND)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_experts_that_are_spread_give_the_bits_of_one_rank(seed: int) -> None:
    """Also where nobody chooses some of them, and where every row chooses the same."""
    assert SOUND is not None
    check_groups(seed, SOUND, sizes=(2, 4, 8), world=draw_expert_world(seed))


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
@pytest.mark.skipif(SOUND is not None and "avx2" not in SOUND.available, reason="the faults are planted in AVX2 code")
def test_planted_faults_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.models.ends.MOST_ROWS", 1)
    planted = build(tmp_path / "kernels")
    for seed in range(4):
        check_groups(seed, planted.lib, sizes=(2, 4))
    for name in FAULTS:
        assert _is_noticed(planted, name), f"no row had other bits although {name}"


def _is_noticed(planted: Planted, name: str) -> bool:
    with planted.plant(name) as lib:
        for seed in range(40):
            try:
                check_groups(seed, lib, sizes=(2, 4))
            except (AssertionError, PipeinferError):
                return True
    return False


def test_more_rows_than_a_slot_holds() -> None:
    assert SOUND is not None
    world = some_world(2)
    tokens = [world.tokens[row % len(world.tokens)] for row in range(150)]
    batch = batch_in_order(tokens, 0)
    world.tokens = tokens
    alone = load(world, SOUND)
    for how in (How(2), How(2, two_shot=1), How(2, fused=False)):
        with grouped(world, how) as shards:
            hidden: tuple[Any, Any] = (None, None)
            for one, whole in zip(alone, shards, strict=True):
                hidden = run_pass(one, batch, hidden[0]), run_pass(whole, batch, hidden[1])
                assert torch.equal(*hidden), how
            for names in (("temperature",), ("temperature", "top_k")):
                draw = draw_by_row(len(tokens), names)
                said = [shard.sample(hidden[0], range(len(tokens)), 1, draw) for shard in (alone[-1], shards[-1])]
                assert said[0] == said[1], how


def draw_by_row(rows: int, names: tuple[str, ...]) -> SamplingInputs:
    """A draw after ``rows`` rows, each with a seed of its own; most have another temperature, and some another top_k,
    where ``names`` has these."""
    changed = {name: number for name, number in (("temperature", 0.75), ("top_k", 7)) if name in names}
    samplings = [Sampling(0.5 if row % 3 else 0.0, seed=row) for row in range(rows)]
    samplings = [one if row % 5 else replace(one, **changed) for row, one in enumerate(samplings)]  # type: ignore[arg-type]
    return SamplingInputs(tuple(samplings), np.arange(rows) + 1)


@pytest.mark.parametrize("fused", [True, False])
def test_an_abandoned_pass_leaves_no_exchange_without_a_partner(fused: bool) -> None:
    assert SOUND is not None
    world = some_world(2, layers=3)
    (alone,) = load(world, SOUND)
    batch = batch_in_order(world.tokens, 0)
    truth = run_pass(alone, batch, None)
    with grouped(world, How(2, fused)) as (whole,):
        for layers in (0, 1, 2, 3, 1):
            run_pass(whole, batch, None, layers)
            assert torch.equal(run_pass(whole, batch, None), truth), f"after {layers} layers of another pass"


def test_who_is_late_is_named_and_nobody_waits_for_ever() -> None:
    first, _ = make_groups(How(2, timeout_s=0.2), 65536)  # of which the second reads nothing
    with pytest.raises(StallError, match=r"rank 0 waited 0\.2 s for rank 1 of its group"):
        first.tell(bytes(2 * RING))


def test_a_rank_that_never_comes_to_an_exchange_is_named() -> None:
    assert SOUND is not None
    world = some_world(2)
    slot = slot_nbytes([world.spec.hidden_size], [world.spec.vocab_size])
    groups = make_groups(How(2, timeout_s=0.2), slot)
    shard = KernelShard.load(world.spec, world.weights, range(1), world.dtype, 64, None, groups[0])
    with pytest.raises(StallError, match="rank 0 waited"):
        run_pass(shard, batch_in_order(world.tokens[:3], 0), None)


def test_an_abort_ends_every_wait() -> None:
    groups = make_groups(How(2), 65536)
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            groups[1].hear()
        except StallError as error:
            ended.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    groups[0].abort()
    thread.join(20)
    assert [str(error) for error in ended] == ["rank 1 was told that the job ends"]


@pytest.mark.parametrize("fused", [True, False])
def test_commands_of_any_size_arrive_in_order(fused: bool) -> None:
    groups = make_groups(How(3, fused), 65536)
    heard: list[list[Any]] = [[], []]
    sizes = (0, 1, 7, 65536, RING - 8, RING, 3 * RING + 5, 2)
    sent = [bytes([number]) * size for number, size in enumerate(sizes)]

    def listen(index: int) -> None:
        groups[1 + index].follow(lambda command: bool(heard[index].append(command) or command != "end"))

    threads = [threading.Thread(target=listen, args=(index,), daemon=True) for index in range(2)]
    for thread in threads:
        thread.start()
    for command in (*sent, "end"):
        groups[0].tell(command)
    for thread in threads:
        thread.join(60)
    assert heard == [[*sent, "end"]] * 2


def test_the_faster_path_is_taken_for_each_number_of_rows() -> None:
    """By a clock that finds windows slow for one row and quick for more."""
    assert SOUND is not None
    world = some_world(2)
    world.tokens = world.tokens * 100
    with grouped(world, How(2)) as shards:
        group, now = shards[0]._group, [0.0]

        def clock() -> float:
            # Called before and after a pass: what has passed since then depends on the path and the rows.
            now[0] += {(1, True): 0.2, (1, False): 0.1}.get((rows_of(), group.is_fused), 0.3 - 0.1 * group.is_fused)
            return now[0]

        def rows_of() -> int:
            return seen[-1] if seen else 1

        seen: list[int] = []
        forward = shards[0].forward

        def watched(batch: Any, hidden: Any) -> Any:
            seen.append(len(batch.slots))
            return forward(batch, hidden)

        shards[0].forward = watched
        choose_path(group, shards[0], 64, None, clock)
        assert group.fuses(8) and group.fuses(64) and group.fuses(512)
        assert group.paths == "bulk from 1 rows on, fused from 8 rows on, fused from 64 rows on"


@pytest.mark.slow
@pytest.mark.parametrize(("size", "two_shot"), [(2, None), (4, None), (4, 1)])
def test_many_exchanges_of_ranks_that_are_late_at_random(size: int, two_shot: int | None) -> None:
    assert SOUND is not None
    assert endure(600, size, two_shot, seed=1, lib=SOUND) > 50


def test_what_cannot_be_split_is_refused_by_name() -> None:
    spec = draw_world(0, False).spec
    five = replace(spec, head_count=5, kv_head_count=5, head_dim=16, intermediate_size=1024)
    with pytest.raises(UserError, match="--tp 2: 5 heads cannot be split among 2 ranks"):
        refuse_unsplittable(five, 2)
    uneven = replace(spec, head_count=10, kv_head_count=5, head_dim=16, intermediate_size=1024)
    assert can_split(uneven, 1) and not can_split(uneven, 4)
    shared = replace(spec, head_count=16, kv_head_count=2, head_dim=16, intermediate_size=1024)
    parts = [Split(shared, rank, 8) for rank in range(8)]
    assert [(list(part.heads), list(part.kv_heads)) for part in parts[3:5]] == [([6, 7], [0]), ([8, 9], [1])]
    assert np.concatenate([np.array(part.inner) for part in parts]).tolist() == list(range(1024))


def test_all_ranks_count_the_same_exchanges() -> None:
    assert SOUND is not None
    world = some_world(4)
    learn(world, load(world, SOUND), SOUND, SOUND.isa)
    with grouped(world, How(4)) as shards:
        hidden = None
        for shard in shards:
            hidden = run_pass(shard, batch_in_order(world.tokens[:5], 0), hidden)
        shards[-1].sample(hidden, range(5), 1)
        group = shards[0]._group
        assert group.exchanges == {"fused": 2 * world.spec.layer_count + 2, "bulk": 0}
