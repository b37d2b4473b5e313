"""Who plays what: every layer once, in order, shares as even as they can be."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeinfer.core.addresses import ORCHESTRATOR, drafter_address, stage_address
from pipeinfer.core.errors import UserError
from pipeinfer.placement.roles import assign, count, group_of, place, rank_of_role, split_layers, stage_sizes


@given(st.integers(1, 200), st.data(), st.floats(0, 5))
def test_layers_are_split_once_in_order_and_evenly(layers: int, data: st.DataObject, head_cost: float) -> None:
    stages = data.draw(st.integers(1, layers))
    shares = split_layers(layers, stage_sizes(layers, stages, head_cost))
    assert [layer for share in shares for layer in share] == list(range(layers))
    assert len(shares) == stages
    sizes = [len(share) for share in shares]
    assert min(sizes) >= 1
    assert max(sizes[:-1], default=0) - min(sizes[:-1], default=0) <= 1
    if head_cost == 0:
        assert max(sizes) - min(sizes) <= 1


def test_the_last_stage_is_spared_for_its_output_head() -> None:
    assert [len(share) for share in split_layers(32, stage_sizes(32, 4, 4.0))] == [9, 9, 9, 5]


@pytest.mark.parametrize(
    ("layers", "sizes", "whole", "lengths"),
    [
        (11, [1, 1, 1], math.floor, [3, 4, 4]),
        (11, stage_sizes(11, 3), math.floor, [3, 4, 4]),
        (10, stage_sizes(10, 3), math.floor, [3, 4, 3]),
        (11, [1.0, 1.0, 1.0], round, [4, 3, 4]),
        (81, [1.0] * 10, round, [8, 8, 8, 8, 8, 9, 8, 8, 8, 8]),
        (80, [2 / 3, *[1.0] * 6], round, [8, 12, 12, 12, 12, 12, 12]),
        (9, [4, 2, 3], math.floor, [4, 2, 3]),
    ],
)
def test_layers_are_split_in_proportion(
    layers: int, sizes: list[float], whole: Callable[[float], int], lengths: list[int]
) -> None:
    shares = split_layers(layers, sizes, whole)
    assert [len(share) for share in shares] == lengths
    assert [layer for share in shares for layer in share] == list(range(layers))


@pytest.mark.parametrize("drafters", [0, 1, 2])
def test_rank_0_may_host_the_orchestrator_only(drafters: int) -> None:
    plan = place(split_layers(6, [1, 1, 1]), drafters, is_rank_0_shared=False)
    addresses = [role.address for roles in plan for role in roles]
    expected = [ORCHESTRATOR, *map(stage_address, range(3)), *map(drafter_address, range(drafters))]
    assert addresses == expected
    assert all(len(roles) == 1 for roles in plan)


@pytest.mark.parametrize("ranks", range(1, 10))
def test_with_a_drafter_rank_0_leads_and_drafts(ranks: int) -> None:
    plan = assign(ranks, 8, drafters=1)
    assert len(plan) == ranks
    head = [role.address for role in plan[0]]
    assert head[:2] == [ORCHESTRATOR, drafter_address(0)]
    assert count(plan) == (max(1, ranks - 1), 1)
    assert rank_of_role(plan)[stage_address(0)] == (0 if ranks == 1 else 1)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_without_a_drafter_every_rank_is_a_stage(ranks: int) -> None:
    plan = assign(ranks, 8, drafters=0)
    assert count(plan) == (ranks, 0)
    assert [rank_of_role(plan)[stage_address(index)] for index in range(ranks)] == list(range(ranks))


@pytest.mark.parametrize(("drafters", "most"), [(1, 9), (0, 8), (3, 11)])
def test_more_stages_than_layers_are_refused_with_the_number_that_works(drafters: int, most: int) -> None:
    assign(most, 8, drafters)
    with pytest.raises(UserError, match=f"at most {most} ranks"):
        assign(most + 1, 8, drafters)


def names(ranks: int, drafters: int, tp: int, stages: int | None = None) -> list[list[str]]:
    return [[role.name for role in roles] for roles in assign(ranks, 8, drafters, tp=tp, stages=stages)]


def test_groups_share_stages_and_a_drafter_may_have_a_rank_of_its_own() -> None:
    assert names(5, drafters=1, tp=2) == [
        ["orchestrator", "drafter 0"], ["stage 0"], ["part 1 of stage 0"], ["stage 1"], ["part 1 of stage 1"],
    ]  # fmt: skip
    assert names(4, drafters=2, tp=2) == [
        ["orchestrator", "drafter 0"], ["stage 0"], ["part 1 of stage 0"], ["drafter 1"]
    ]  # fmt: skip


def test_without_ranks_for_drafters_the_first_group_shares_the_drafts() -> None:
    assert names(4, drafters=1, tp=2) == [
        ["orchestrator", "drafter 0", "stage 0"], ["part 1 of drafter 0", "part 1 of stage 0"],
        ["stage 1"], ["part 1 of stage 1"],
    ]  # fmt: skip
    assert names(2, drafters=0, tp=2) == [["orchestrator", "stage 0"], ["part 1 of stage 0"]]


def test_only_leaders_have_roles_that_others_send_to() -> None:
    plan = assign(7, 8, drafters=1, tp=3)
    assert rank_of_role(plan) == {ORCHESTRATOR: 0, drafter_address(0): 0, stage_address(0): 1, stage_address(1): 4}
    assert count(plan) == (2, 1)
    assert [group_of(plan, rank) for rank in range(7)] == [(0, 1), *[(1, 3)] * 3, *[(4, 3)] * 3]


def test_the_number_of_stages_may_be_said() -> None:
    assert names(4, drafters=1, tp=1, stages=3) == names(4, drafters=1, tp=1)
    with pytest.raises(UserError, match="--stages 2, but 4 ranks make 3"):
        assign(4, 8, drafters=1, stages=2)
